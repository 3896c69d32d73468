// The functions an update rule may call, in IEEE arithmetic. Their torch form is in fusedopt/binding.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FUSEDOPT_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDOPT_INLINE inline __attribute__((always_inline))
#endif
#define FUSEDOPT_NOINLINE __attribute__((noinline))

namespace fusedopt {

// Every instruction set compiles its own copy: without internal linkage the linker could pick the AVX-512 one for all.
namespace {

#if defined(__CUDA_ARCH__)
FUSEDOPT_INLINE float abs(float x) { return ::fabsf(x); }
FUSEDOPT_INLINE double abs(double x) { return ::fabs(x); }
FUSEDOPT_INLINE float sqrt(float x) { return __fsqrt_rn(x); }
FUSEDOPT_INLINE double sqrt(double x) { return __dsqrt_rn(x); }
#else
FUSEDOPT_INLINE float abs(float x) { return __builtin_fabsf(x); }
FUSEDOPT_INLINE double abs(double x) { return __builtin_fabs(x); }
FUSEDOPT_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
#endif

// NaN has sign 0.
template <class T>
FUSEDOPT_INLINE T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}

// NaN in either argument is NaN.
template <class T>
FUSEDOPT_INLINE T minimum(T a, T b) {
  return a < b || a != a ? a : b;
}
template <class T>
FUSEDOPT_INLINE T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

template <class T>
FUSEDOPT_INLINE T where(bool condition, T a, T b) {
  return condition ? a : b;
}

}  // namespace
}  // namespace fusedopt
