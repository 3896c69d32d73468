// The kernels of one rule, which FUSEDOPT_RULE names.
#include <cuda_pipeline.h>

#include "step.cuh"

namespace fusedopt {

#define FUSEDOPT_JOIN(A, B) A##B
#define FUSEDOPT_KERNEL(RULE, T, BLOCKS)                                       \
  extern "C" __global__ void __launch_bounds__(cuda_threads, BLOCKS)           \
      FUSEDOPT_JOIN(RULE, _##T)(const __grid_constant__ StepArguments given) { \
    __shared__ Step<RULE, T>::Shared shared;                                   \
    step<RULE, T>(given, shared);                                              \
  }

FUSEDOPT_KERNEL(FUSEDOPT_RULE, float, 5)
FUSEDOPT_KERNEL(FUSEDOPT_RULE, double, 2)

}  // namespace fusedopt
