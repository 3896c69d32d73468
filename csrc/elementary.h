// exp, the logistic function and erf of many float32 at once, without calls and branches: every instruction set gives
// the same bits. Errors in units in the last place (ulp) are measured by tests/test_glu.py. For float64 they are the
// mathematics library's.
#pragma once

#include "lanes.h"

namespace fusedopt {
namespace {

// x = n ln 2 + r with a whole n and |r| <= ln(2) / 2. Added to a float and subtracted, this rounds it to an integer.
constexpr float to_integer = 0x1.8p23f, per_ln2 = 1.44269504f;
constexpr float ln2 = 0x1.62e4p-1f, rest_of_ln2 = 0x1.7f7d1cp-20f;  // two parts, of which n times the first is exact

// exp(r) of |r| <= ln(2) / 2, fitted to the least relative error. The halves of the sum do not wait for each other.
FUSEDOPT_INLINE Lanes exp_near_0(const Lanes& r) {
  const Lanes square = r * r;
  const Lanes low = 0.49999994f + 0.166665211f * r;
  const Lanes high = 4.1668389e-2f + 8.36871751e-3f * r + 1.38145965e-3f * square;
  return 1.0f + (r + square * (low + square * high));
}

// exp(x) of x <= 0, within 1 ulp.
FUSEDOPT_INLINE Lanes exp_of_negative(const Lanes& argument) {
  const Lanes x = at_least(-104.0f, argument);  // already 0
  // 2^64 times too large and then made smaller, for 2^-150 is no normal float, and rounding comes last.
  constexpr float biased = to_integer + 127 + 64;
  const Lanes shifted = x * per_ln2 + biased, n = shifted - biased;
  return exp_near_0((x - n * ln2) - n * rest_of_ln2) * power_of_two(shifted) * 0x1p-64f;
}
FUSEDOPT_INLINE double exp_of_negative(double x) { return __builtin_exp(x); }

// 1 / (1 + exp(-x)) and 1 less that, both within 2.5 ulp, subnormal results too, of `argument`: x brought to where that
// makes no difference to the former, nor to 1 + x * rest, which is 1 there.
template <class Value>
struct Sigmoid {
  Value value, rest, argument;
};
FUSEDOPT_INLINE Sigmoid<Lanes> sigmoid(const Lanes& x) {
  const Lanes argument = clamp(x, -104.0f, 70.0f);
  // All is scaled by 2^-24, for exp(104) is no float.
  constexpr float one = 0x1p-24f, biased = to_integer + 127 - 24;
  const Lanes shifted = argument * -per_ln2 + biased, n = shifted - biased;
  const Lanes inverse = exp_near_0((n * -ln2 - argument) - n * rest_of_ln2) * power_of_two(shifted);
  const Lanes sum = one + inverse;
  return {one / sum, inverse / sum, argument};
}
FUSEDOPT_INLINE Sigmoid<double> sigmoid(double x) {
  const double argument = clamp(x, -746.0, 746.0), small = exp_of_negative(-abs(argument)), sum = 1 + small;
  return {(x < 0 ? small : 1) / sum, (x < 0 ? 1 : small) / sum, argument};
}

// Within 1.5 ulp: x times a polynomial in x^2 near 0, 1 - exp(x times a polynomial) elsewhere.
FUSEDOPT_INLINE Lanes erf(const Lanes& x) {
  const Lanes t = at_most(4.0f, abs(x));  // already 1; NaN passes through
  const Lanes s = t * t;
  Lanes p = -5.95373916e-4f * s + 4.98594018e-3f;
  p = p * s - 2.676172e-2f;
  p = p * s + 0.112816826f;
  p = p * s - 0.376124799f;
  p = p * s + 0.128379151f;
  const Lanes near = t + t * p;
  Lanes q = -2.1364601e-4f * t + 3.21215251e-3f;
  q = q * t - 2.28809416e-2f;
  q = q * t + 0.105247714f;
  q = q * t + 0.635729074f;
  q = q * t + 1.12851119f;
  const Lanes far = 1.0f - exp_of_negative(-(t * q));
  const Lanes magnitude = where(t < 0.93f, near, far);
  return where(x < 0.0f, -magnitude, magnitude);
}
FUSEDOPT_INLINE double erf(double x) { return __builtin_erf(x); }

}  // namespace
}  // namespace fusedopt
