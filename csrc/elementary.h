// exp, the logistic function and erf without calls, so that loops over them are vectorised and every instruction set
// gives the same bits. Errors in units in the last place (ulp) of float32 are measured by tests/test_glu.py.
#pragma once

#include "codecs.h"

namespace fusedopt {
namespace {

// exp(x) of x <= 0, within 1 ulp. x = n ln 2 + r with |r| <= ln(2) / 2, and a polynomial in r fitted to the least
// relative error.
FUSEDOPT_INLINE float exp_of_negative(float x) {
  constexpr float to_integer = 0x1.8p23f;  // added and subtracted, it rounds to an integer
  x = x < -104.0f ? -104.0f : x;           // already 0
  const float shifted = x * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  const uint32_t exponent = bits_of(shifted) - bits_of(to_integer);
  // ln 2 in two parts, of which n times the first is exact.
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.38145965e-3f;
  p = p * r + 8.36871751e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = 1.0f + (r + r * r * p);
  // 2^64 times too large and then made smaller, for 2^-150 is no normal float, and rounding comes last.
  const float scaled = float_of(bits_of(p) + ((exponent + 64u) << 23)) * 0x1p-64f;
  return x == x ? scaled : x;
}
FUSEDOPT_INLINE double exp_of_negative(double x) { return __builtin_exp(x); }

// 1 / (1 + exp(-x)), and 1 less that, both within 2.5 ulp, subnormal results too.
template <class T>
struct Sigmoid {
  T value, rest;
};
template <class T>
FUSEDOPT_INLINE Sigmoid<T> sigmoid(T x) {
  const T small = exp_of_negative(-abs(x)), sum = T(1) + small;
  return {(x < T(0) ? small : T(1)) / sum, (x < T(0) ? T(1) : small) / sum};
}

// Within 1.5 ulp: x times a polynomial in x^2 near 0, 1 - exp(x times a polynomial) elsewhere.
FUSEDOPT_INLINE float erf(float x) {
  const float t = abs(x) > 4.0f ? 4.0f : abs(x);  // already 1; NaN passes through
  const float s = t * t;
  float p = -5.95373916e-4f;
  p = p * s + 4.98594018e-3f;
  p = p * s - 2.676172e-2f;
  p = p * s + 0.112816826f;
  p = p * s - 0.376124799f;
  p = p * s + 0.128379151f;
  const float near = t + t * p;
  float q = -2.1364601e-4f;
  q = q * t + 3.21215251e-3f;
  q = q * t - 2.28809416e-2f;
  q = q * t + 0.105247714f;
  q = q * t + 0.635729074f;
  q = q * t + 1.12851119f;
  const float far = 1.0f - exp_of_negative(-(t * q));
  const float magnitude = t < 0.93f ? near : far;
  return x < 0.0f ? -magnitude : magnitude;
}
FUSEDOPT_INLINE double erf(double x) { return __builtin_erf(x); }

}  // namespace
}  // namespace fusedopt
