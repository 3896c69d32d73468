// Four registers of float32, which take arithmetic as one number does: what is written for a number works on them too.
// An elementary function is a chain of operations of which each waits for the last. A processor does not look far
// enough ahead to fill the wait with what follows in a loop, so four chains are woven into one.
#pragma once

#include <type_traits>

#include "codecs.h"

namespace fusedopt {
namespace {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

// Not a typedef of a template's own type: as a template argument GCC would take that for its element.
typedef float FloatVector __attribute__((vector_size(register_bytes)));
typedef double DoubleVector __attribute__((vector_size(register_bytes)));
typedef uint32_t BitsVector __attribute__((vector_size(register_bytes)));
typedef int32_t MaskVector __attribute__((vector_size(register_bytes)));  // all bits of a lane, or none

constexpr int woven = 4, woven_lanes = woven * register_bytes / int(sizeof(float));
#define FUSEDOPT_UNROLLED _Pragma("GCC unroll 4")
struct Lanes {
  FloatVector part[woven];
};
struct Mask {
  MaskVector part[woven];
};

#define FUSEDOPT_EACH(OUT, EXPRESSION)                                          \
  OUT out;                                                                      \
  FUSEDOPT_UNROLLED for (int k = 0; k < woven; ++k) out.part[k] = (EXPRESSION); \
  return out;
#define FUSEDOPT_ARITHMETIC(OP)                                                                                      \
  FUSEDOPT_INLINE Lanes operator OP(const Lanes& a, const Lanes& b) { FUSEDOPT_EACH(Lanes, a.part[k] OP b.part[k]) } \
  FUSEDOPT_INLINE Lanes operator OP(const Lanes& a, float b) { FUSEDOPT_EACH(Lanes, a.part[k] OP b) }                \
  FUSEDOPT_INLINE Lanes operator OP(float a, const Lanes& b) { FUSEDOPT_EACH(Lanes, a OP b.part[k]) }
#define FUSEDOPT_COMPARISON(OP) \
  FUSEDOPT_INLINE Mask operator OP(const Lanes& a, float b) { FUSEDOPT_EACH(Mask, a.part[k] OP b) }

FUSEDOPT_ARITHMETIC(+)
FUSEDOPT_ARITHMETIC(-)
FUSEDOPT_ARITHMETIC(*)
FUSEDOPT_ARITHMETIC(/)
FUSEDOPT_COMPARISON(<)
FUSEDOPT_COMPARISON(<=)
FUSEDOPT_COMPARISON(>=)
FUSEDOPT_INLINE Lanes operator-(const Lanes& a) { FUSEDOPT_EACH(Lanes, -a.part[k]) }
FUSEDOPT_INLINE Mask operator&(const Mask& a, const Mask& b) { FUSEDOPT_EACH(Mask, a.part[k] & b.part[k]) }
FUSEDOPT_INLINE Lanes abs(const Lanes& a) { FUSEDOPT_EACH(Lanes, FloatVector(BitsVector(a.part[k]) & 0x7fffffffu)) }
FUSEDOPT_INLINE Lanes where(const Mask& mask, const Lanes& a, const Lanes& b) {
  FUSEDOPT_EACH(Lanes, mask.part[k] ? a.part[k] : b.part[k])
}
FUSEDOPT_INLINE Lanes where(const Mask& mask, float a, const Lanes& b) {
  FUSEDOPT_EACH(Lanes, mask.part[k] ? FloatVector{} + a : b.part[k])
}
FUSEDOPT_INLINE Lanes where(const Mask& mask, const Lanes& a, float b) {
  FUSEDOPT_EACH(Lanes, mask.part[k] ? a.part[k] : FloatVector{} + b)
}
FUSEDOPT_INLINE Lanes where(const Mask& mask, float a, float b) {
  FUSEDOPT_EACH(Lanes, mask.part[k] ? FloatVector{} + a : FloatVector{} + b)
}

// Of lanes n + 1.5 * 2^23, whose last eight bits become an exponent: 2^(n - 127), 0 < n < 255.
FUSEDOPT_INLINE Lanes power_of_two(const Lanes& a) { FUSEDOPT_EACH(Lanes, FloatVector(BitsVector(a.part[k]) << 23)) }

// Of a value, what its operands may be: the type of one lane.
template <class Value>
struct LaneOf {
  using type = Value;
};
template <>
struct LaneOf<Lanes> {
  using type = float;
};
template <class Value>
using Lane = typename LaneOf<Value>::type;

// NaN passes through, as through the instructions that are named here, which compilers do not find.
#if defined(__AVX512F__)
FUSEDOPT_INLINE FloatVector at_least(float bound, FloatVector x) { return _mm512_max_ps(_mm512_set1_ps(bound), x); }
FUSEDOPT_INLINE FloatVector at_most(float bound, FloatVector x) { return _mm512_min_ps(_mm512_set1_ps(bound), x); }
#elif defined(__AVX2__)
FUSEDOPT_INLINE FloatVector at_least(float bound, FloatVector x) { return _mm256_max_ps(_mm256_set1_ps(bound), x); }
FUSEDOPT_INLINE FloatVector at_most(float bound, FloatVector x) { return _mm256_min_ps(_mm256_set1_ps(bound), x); }
#else
FUSEDOPT_INLINE FloatVector at_least(float bound, FloatVector x) { return x < bound ? FloatVector{} + bound : x; }
FUSEDOPT_INLINE FloatVector at_most(float bound, FloatVector x) { return x > bound ? FloatVector{} + bound : x; }
#endif
template <class T>
FUSEDOPT_INLINE T at_least(T bound, T x) { return x < bound ? bound : x; }
template <class T>
FUSEDOPT_INLINE T at_most(T bound, T x) { return x > bound ? bound : x; }
FUSEDOPT_INLINE Lanes at_least(float bound, const Lanes& x) { FUSEDOPT_EACH(Lanes, at_least(bound, x.part[k])) }
FUSEDOPT_INLINE Lanes at_most(float bound, const Lanes& x) { FUSEDOPT_EACH(Lanes, at_most(bound, x.part[k])) }
template <class Value>
FUSEDOPT_INLINE Value clamp(const Value& x, Lane<Value> least, Lane<Value> most) {
  return at_most(most, at_least(least, x));
}

#undef FUSEDOPT_COMPARISON
#undef FUSEDOPT_ARITHMETIC
#undef FUSEDOPT_EACH

// The `n` elements at a place; where a value holds more, they are 0. A whole one is copied part by part, for as one
// piece compilers leave it in memory.
template <class Value, class T>
FUSEDOPT_INLINE Value load(const T* source, int64_t n) {
  Value value{};
  if constexpr (std::is_same_v<Value, Lanes>) {
    if (n == woven_lanes) {
      FUSEDOPT_UNROLLED for (int k = 0; k < woven; ++k)
        std::memcpy(&value.part[k], source + k * (woven_lanes / woven), register_bytes);
      return value;
    }
  }
  std::memcpy(&value, source, size_t(n) * sizeof(T));
  return value;
}
template <class Value, class T>
FUSEDOPT_INLINE void store(const Value& value, T* target, int64_t n) {
  if constexpr (std::is_same_v<Value, Lanes>) {
    if (n == woven_lanes) {
      FUSEDOPT_UNROLLED for (int k = 0; k < woven; ++k)
        std::memcpy(target + k * (woven_lanes / woven), &value.part[k], register_bytes);
      return;
    }
  }
  std::memcpy(target, &value, size_t(n) * sizeof(T));
}

// Calls work(start, count) for every `Value` of `n` elements, and for what is left.
template <class Value, class Work>
FUSEDOPT_INLINE void for_each_value(int64_t n, Work work) {
  constexpr int64_t width = sizeof(Value) / sizeof(Lane<Value>);
  int64_t i = 0;
  for (; i + width <= n; i += width) work(i, width);
  if (i < n) work(i, n - i);
}

}  // namespace
}  // namespace fusedopt
