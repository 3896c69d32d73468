#include <cuda_pipeline.h>

#include "norm.cuh"

namespace fusedopt {

extern "C" __global__ void __launch_bounds__(cuda_threads) squares(const __grid_constant__ NormArguments given) {
  square_sums(given);
}

extern "C" __global__ void __launch_bounds__(cuda_threads) sums(const __grid_constant__ SumArguments given) {
  sums_of_sums(given);
}

}  // namespace fusedopt
