// The kernels of the instruction set this file is compiled for. Included once by each cpu/<instruction set>.cpp.
#pragma once

#include "../norm.h"

#define FUSEDOPT_FLOAT32(RULE) update_range<RULE, float>,
#define FUSEDOPT_FLOAT64(RULE) update_range<RULE, double>,

#define FUSEDOPT_KERNELS(ISA)                                                         \
  namespace fusedopt {                                                                \
  static const UpdateRange float32_kernels[] = {FUSEDOPT_RULES(FUSEDOPT_FLOAT32)};      \
  static const UpdateRange float64_kernels[] = {FUSEDOPT_RULES(FUSEDOPT_FLOAT64)};      \
  extern const Kernels ISA##_kernels;                                                 \
  const Kernels ISA##_kernels = {#ISA, float32_kernels, float64_kernels, square_sums};  \
  }
