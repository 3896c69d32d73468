// The kernels of the instruction set this file is compiled for. Included once by each cpu/<instruction set>.cpp.
#pragma once

#include "../glu.h"
#include "../matmul_kernel.h"
#include "../norm.h"
#include "../rms_norm.h"

#define FUSEDOPT_FLOAT32(RULE) update_range<RULE, float>,
#define FUSEDOPT_FLOAT64(RULE) update_range<RULE, double>,
#define FUSEDOPT_GLU_FORWARD(ACTIVATION) glu_forward<ACTIVATION, T>,
#define FUSEDOPT_GLU_BACKWARD(ACTIVATION) glu_backward<ACTIVATION, T>,

namespace fusedopt {
namespace {

template <class T>
void (*const glu_forward_kernels[])(const Glu&, int64_t, int64_t) = {FUSEDOPT_ACTIVATIONS(FUSEDOPT_GLU_FORWARD)};
template <class T>
void (*const glu_backward_kernels[])(const Glu&, int64_t, int64_t) = {FUSEDOPT_ACTIVATIONS(FUSEDOPT_GLU_BACKWARD)};
template <class T>
constexpr RowKernels<T> row_kernels = {rms_norm_forward<T>, rms_norm_backward<T>, glu_forward_kernels<T>,
                                       glu_backward_kernels<T>};

}  // namespace
}  // namespace fusedopt

#define FUSEDOPT_KERNELS(ISA)                                                                                       \
  namespace fusedopt {                                                                                              \
  static const UpdateRange float32_kernels[] = {FUSEDOPT_RULES(FUSEDOPT_FLOAT32)};                                    \
  static const UpdateRange float64_kernels[] = {FUSEDOPT_RULES(FUSEDOPT_FLOAT64)};                                    \
  extern const Kernels ISA##_kernels;                                                                               \
  const Kernels ISA##_kernels = {#ISA,        float32_kernels,    float64_kernels,                                   \
                                 square_sums, row_kernels<float>, row_kernels<double>, matmul_tile<Float32>};       \
  }
