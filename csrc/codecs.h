// How a tensor is stored: a block of elements read into float32 (or double) and written back.
// The reference is fusedopt/codecs.py; both give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "functions.h"
#include "int8.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedopt {

// int8_*: codes of a quantized state, with a scale for each block. low*: what a split parameter lacks, in parameter.h.
enum class Storage : uint8_t { float32, float64, bfloat16, float16, int8_signed, int8_unsigned, low16, low8 };

FUSEDOPT_INLINE constexpr int element_size(Storage storage) {
  switch (storage) {
    case Storage::float64: return 8;
    case Storage::float32: return 4;
    case Storage::bfloat16:
    case Storage::float16:
    case Storage::low16: return 2;
    default: return 1;
  }
}

constexpr const char* storage_name(Storage storage) {
  constexpr const char* names[] = {"float32",     "float64",       "bfloat16", "float16",
                                   "int8_signed", "int8_unsigned", "low16",    "low8"};
  return names[int(storage)];
}

// Elements read into the arithmetic type at a time: small enough for every operand of a rule to stay in L1.
constexpr int64_t block_size = 512;
static_assert(block_size % int8_block == 0, "a quantized block must not be cut");

namespace {

FUSEDOPT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSEDOPT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FUSEDOPT_INLINE float from_bfloat16(uint16_t x) { return float_of(uint32_t(x) << 16); }

// Nearest, ties to even, in integers: vcvtneps2bf16 would flush subnormals.
FUSEDOPT_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  return uint16_t((x != x ? quiet_nan : rounded) >> 16);
}

// Exact. A half's exponent and mantissa, shifted into place, are a float 2^112 times too small; multiplying repairs
// subnormals too. Infinity and NaN need the exponent of all ones.
FUSEDOPT_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of((magnitude >= 0x0f800000u ? special : finite) | uint32_t(x & 0x8000u) << 16);
}

// Nearest, ties to even. Below 2^-14 the spacing is 2^-24, and adding a half of 2^0 lets the adder round there.
FUSEDOPT_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(half | (bits >> 16 & 0x8000u));
}

#if defined(__F16C__)
// The same conversions in hardware; they are IEEE, and the compiler does not find them in the code above.
inline void decode_float16(const uint16_t* source, float* target, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(target + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#endif
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  for (; i < n; ++i) target[i] = from_float16(source[i]);
}

inline void encode_float16(const float* source, uint16_t* target, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; ++i) target[i] = to_float16(source[i]);
}
#else
inline void decode_float16(const uint16_t* source, float* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = from_float16(source[i]);
}

inline void encode_float16(const float* source, uint16_t* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = to_float16(source[i]);
}
#endif

// Reads `n` stored elements, at most block_size, as T; `scale` is that of the first, where there are scales. Not inlined:
// one copy serves every rule.
template <class T>
void decode(Storage storage, const void* source, const float* scale, T* __restrict target, int64_t n);

template <>
FUSEDOPT_NOINLINE void decode(Storage storage, const void* source, const float* scale, float* __restrict target,
                              int64_t n) {
  switch (storage) {
    case Storage::float32: {
      std::memcpy(target, source, size_t(n) * sizeof(float));
      break;
    }
    case Storage::float64: {
      const auto* x = static_cast<const double*>(source);
      for (int64_t i = 0; i < n; ++i) target[i] = float(x[i]);
      break;
    }
    case Storage::bfloat16: {
      const auto* x = static_cast<const uint16_t*>(source);
      for (int64_t i = 0; i < n; ++i) target[i] = from_bfloat16(x[i]);
      break;
    }
    case Storage::float16:
      decode_float16(static_cast<const uint16_t*>(source), target, n);
      break;
    case Storage::int8_signed:
    case Storage::int8_unsigned:
      decode_int8(storage == Storage::int8_signed, static_cast<const uint8_t*>(source), scale, target, n);
      break;
    case Storage::low16:
    case Storage::low8: break;  // not values of their own
  }
}

// Writes `n` elements of T as stored; narrower formats round to nearest, ties to even.
template <class T>
void encode(Storage storage, const T* __restrict source, void* target, float* scale, int64_t n);

template <>
FUSEDOPT_NOINLINE void encode(Storage storage, const float* __restrict source, void* target, float* scale, int64_t n) {
  switch (storage) {
    case Storage::float32: {
      std::memcpy(target, source, size_t(n) * sizeof(float));
      break;
    }
    case Storage::float64: {
      auto* x = static_cast<double*>(target);
      for (int64_t i = 0; i < n; ++i) x[i] = source[i];
      break;
    }
    case Storage::bfloat16: {
      auto* x = static_cast<uint16_t*>(target);
      for (int64_t i = 0; i < n; ++i) x[i] = to_bfloat16(source[i]);
      break;
    }
    case Storage::float16:
      encode_float16(source, static_cast<uint16_t*>(target), n);
      break;
    case Storage::int8_signed:
    case Storage::int8_unsigned:
      encode_int8(storage == Storage::int8_signed, source, static_cast<uint8_t*>(target), scale, n);
      break;
    case Storage::low16:
    case Storage::low8: break;
  }
}

// Double goes through float32 to the narrower formats, as torch's own conversions do.
template <>
FUSEDOPT_NOINLINE void decode(Storage storage, const void* source, const float* scale, double* __restrict target,
                              int64_t n) {
  if (storage == Storage::float64) {
    std::memcpy(target, source, size_t(n) * sizeof(double));
    return;
  }
  float single[block_size];
  decode(storage, source, scale, single, n);
  for (int64_t i = 0; i < n; ++i) target[i] = single[i];
}

template <>
FUSEDOPT_NOINLINE void encode(Storage storage, const double* __restrict source, void* target, float* scale, int64_t n) {
  if (storage == Storage::float64) {
    std::memcpy(target, source, size_t(n) * sizeof(double));
    return;
  }
  float single[block_size];
  for (int64_t i = 0; i < n; ++i) single[i] = float(source[i]);
  encode(storage, single, target, scale, n);
}

}  // namespace
}  // namespace fusedopt
