// State in 8 bits: blocks of 256 elements as codes and one scale, read into float32 and written back.
// The reference is fusedopt/codecs.py, section "8 bits"; both give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "functions.h"

namespace fusedopt {
namespace {

constexpr int64_t int8_block = 256;

namespace int8 {

// As in codecs.py: magnitude k is slope[row] * k + offset[row]. Its code is zero + k, for a negative number zero - k.
struct DynamicMap {
  int zero;
  int first[9];  // k at which a row begins
  float slope[9], offset[9];
};

constexpr DynamicMap signed_map = {
    127,
    {0, 1, 2, 4, 8, 16, 32, 64, 128},
    {0, 9e-07, 4.5e-06, 2.25e-05, 0.0001125, 0.0005625, 0.0028125, 0.0140625, 0},
    {0, -3.5e-07, -5.75e-06, -6.875e-05, -0.00074375, -0.00771875, -0.07859375, -0.79296875, 1},
};
constexpr DynamicMap unsigned_map = {
    0,
    {0, 1, 3, 7, 15, 31, 63, 127, 255},
    {0, 4.5e-07, 2.25e-06, 1.125e-05, 5.625e-05, 0.00028125, 0.00140625, 0.00703125, 0},
    {0, -1.25e-07, -4.625e-06, -6.3125e-05, -0.000715625, -0.0075781248, -0.077890625, -0.78945309, 1},
};

// Exact in double, so that rounding to float32 is the only rounding, as of a fused multiply-add.
constexpr float magnitude(const DynamicMap& map, int k) {
  int row = 8;
  while (k < map.first[row]) --row;
  return float(double(map.slope[row]) * k + double(map.offset[row]));
}

// By row, modulo 8: rows 0 and 8 hold one number each, 0 and 1, and share an entry, the line through both. With eight
// entries a permutation of one register looks them up.
struct Tables {
  float value[256];           // by code
  float unit;                 // the exponent of unit * k (signed) or unit * (k + 1) is the row modulo 8
  float slope[8], offset[8];  // magnitude = slope * (unit * k) + offset
  float threshold[8];         // from which on x is in the next row
  float steepness[8];         // k = round((x - offset) * steepness)
  float last[8];              // and at most this; thresholds are high enough for k to reach the row's first
};

constexpr Tables tables_from(const DynamicMap& map) {
  Tables tables{};
  tables.unit = map.zero ? 4 : 2;
  const float top = float(map.first[8]);
  for (int code = 0; code < 256; ++code) {
    const int k = code - map.zero;
    tables.value[code] = k < 0 ? -magnitude(map, -k) : magnitude(map, k);
  }
  for (int row = 0; row < 8; ++row) {
    const int next = map.first[row + 1];
    tables.slope[row] = (row ? map.slope[row] : 1 / top) / tables.unit;
    tables.offset[row] = map.offset[row];
    tables.threshold[row] = (magnitude(map, next - 1) + magnitude(map, next)) * 0.5f;
    tables.steepness[row] = row ? 1 / map.slope[row] : top;
    tables.last[row] = row ? float(next - 1) : top;
  }
  return tables;
}

template <bool is_signed>
constexpr DynamicMap map_of = is_signed ? signed_map : unsigned_map;
template <bool is_signed>
alignas(64) constexpr Tables tables_of = tables_from(map_of<is_signed>);

// Any processor. The compiler vectorises this, since it looks nothing up.
template <bool is_signed>
void encode_values(const float* __restrict source, uint8_t* __restrict codes, float inverse, int64_t n) {
  constexpr const Tables& tables = tables_of<is_signed>;
  for (int64_t i = 0; i < n; ++i) {
    const float value = source[i] * inverse, x = is_signed ? abs(value) : value;
    float index = 0;
    for (int row = 0; row < 8; ++row) {
      const int next = (row + 1) % 8;
      const float k = (x - tables.offset[next]) * tables.steepness[next];
      const float in_row = tables.last[next] < k ? tables.last[next] : k;
      index = x >= tables.threshold[row] ? in_row : index;
    }
    index += 0x1.8p23f;  // leaves no bits for a fraction
    int32_t k;
    std::memcpy(&k, &index, sizeof k);
    k &= 0x1ff;
    codes[i] = uint8_t(!is_signed ? k : value < 0 ? 127 - (k < 127 ? k : 127) : 127 + k);
  }
}

#if defined(__AVX2__) && defined(__FMA__)
#define FUSEDOPT_INT8_VECTORS

// A vector's row is guessed from the upper half of the bits of x, nearly a logarithm: times 158 / 65536 they count
// decades. Modulo 8 the guess is the row or the one before, for it steps amid a row: at 9.2e-7, 9.0e-6, ... 0.69.
// At `smallest` it is right, and below there is only row 0.
constexpr int guess_factor = 158;
constexpr float smallest = 0x1p-23f;

// The vectors of an instruction set. Arithmetic on Floats is by operators.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
struct Vector {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int width = 16;

  static FUSEDOPT_INLINE Floats all(float x) { return _mm512_set1_ps(x); }
  static FUSEDOPT_INLINE Floats load(const float* source) { return _mm512_loadu_ps(source); }
  static FUSEDOPT_INLINE void store(float* target, Floats x) { _mm512_storeu_ps(target, x); }
  static FUSEDOPT_INLINE Floats permute(const float* table, Words index) {
    return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
  }
  static FUSEDOPT_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static FUSEDOPT_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static FUSEDOPT_INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }
  // -x where `sign` is negative.
  static FUSEDOPT_INLINE Floats flip_sign(Floats x, Floats sign) {
    return _mm512_xor_ps(x, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static FUSEDOPT_INLINE Words guess(Floats x) {
    return _mm512_srli_epi32(_mm512_mulhi_epu16(_mm512_castps_si512(x), _mm512_set1_epi32(guess_factor << 16)), 16);
  }
  static FUSEDOPT_INLINE Words next_if_reached(Words row, Floats x, Floats threshold) {
    const __mmask16 reached = _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ);
    return _mm512_mask_add_epi32(row, reached, row, _mm512_set1_epi32(1));
  }
  static FUSEDOPT_INLINE Words exponent(Floats x) { return _mm512_srli_epi32(_mm512_castps_si512(x), 23); }
  // The codes as the last bits of floats: of 2^23 * unit + unit * code.
  static FUSEDOPT_INLINE Floats load_codes(const uint8_t* codes, float unit) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_or_ps(_mm512_castsi512_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(0x1p23f * unit));
  }
  template <bool is_signed>
  static FUSEDOPT_INLINE void store_codes(uint8_t* codes, const Floats* k) {
    for (int i = 0; i < 4; ++i) {
      const __m512i rounded = _mm512_cvtps_epi32(k[i]);
      const __m128i bytes = is_signed ? _mm_xor_si128(_mm512_cvtsepi32_epi8(rounded), _mm_set1_epi8(127))
                                      : _mm512_cvtepi32_epi8(rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * width), bytes);
    }
  }
};
#else
struct Vector {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int width = 8;

  static FUSEDOPT_INLINE Floats all(float x) { return _mm256_set1_ps(x); }
  static FUSEDOPT_INLINE Floats load(const float* source) { return _mm256_loadu_ps(source); }
  static FUSEDOPT_INLINE void store(float* target, Floats x) { _mm256_storeu_ps(target, x); }
  static FUSEDOPT_INLINE Floats permute(const float* table, Words index) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  }
  static FUSEDOPT_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static FUSEDOPT_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static FUSEDOPT_INLINE Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static FUSEDOPT_INLINE Floats flip_sign(Floats x, Floats sign) {
    return _mm256_xor_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static FUSEDOPT_INLINE Words guess(Floats x) {
    return _mm256_srli_epi32(_mm256_mulhi_epu16(_mm256_castps_si256(x), _mm256_set1_epi32(guess_factor << 16)), 16);
  }
  static FUSEDOPT_INLINE Words next_if_reached(Words row, Floats x, Floats threshold) {
    return _mm256_sub_epi32(row, _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GE_OQ)));
  }
  static FUSEDOPT_INLINE Words exponent(Floats x) { return _mm256_srli_epi32(_mm256_castps_si256(x), 23); }
  static FUSEDOPT_INLINE Floats load_codes(const uint8_t* codes, float unit) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm256_or_ps(_mm256_castsi256_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(0x1p23f * unit));
  }
  template <bool is_signed>
  static FUSEDOPT_INLINE void store_codes(uint8_t* codes, const Floats* k) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(k[0]), _mm256_cvtps_epi32(k[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(k[2]), _mm256_cvtps_epi32(k[3]));
    __m256i bytes = is_signed ? _mm256_xor_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(127))
                              : _mm256_packus_epi16(low, high);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  }
};
#endif

// Reads whole vectors, and returns how many elements.
template <bool is_signed>
int64_t decode_vectors(const uint8_t* codes, float scale, float* __restrict target, int64_t n) {
  constexpr const Tables& tables = tables_of<is_signed>;
  constexpr float unit = tables.unit, zero = unit * (0x1p23f + float(map_of<is_signed>.zero));
  int64_t i = 0;
  for (; i + Vector::width <= n; i += Vector::width) {
    const auto raised = Vector::load_codes(codes + i, unit);
    const auto k = raised - Vector::all(zero);
    const auto row = Vector::exponent(is_signed ? k : raised - Vector::all(zero - unit));
    const auto offset = Vector::permute(tables.offset, row);
    const auto value = Vector::multiply_add(Vector::permute(tables.slope, row), k,
                                            is_signed ? Vector::flip_sign(offset, k) : offset);
    Vector::store(target + i, value * Vector::all(scale));
  }
  return i;
}

// Writes whole groups of four vectors, and returns how many elements.
template <bool is_signed>
int64_t encode_vectors(const float* __restrict source, uint8_t* __restrict codes, float inverse, int64_t n) {
  constexpr const Tables& tables = tables_of<is_signed>;
  constexpr int64_t group = 4 * Vector::width;
  int64_t i = 0;
  for (; i + group <= n; i += group) {
    Vector::Floats k[4];
    for (int part = 0; part < 4; ++part) {
      // Negated where signed, since a signed byte holds -128 and not 128.
      const auto value = Vector::load(source + i + part * Vector::width) * Vector::all(is_signed ? -inverse : inverse);
      const auto x = Vector::maximum(is_signed ? Vector::absolute(value) : value, Vector::all(smallest));
      const auto guess = Vector::guess(x);
      const auto row = Vector::next_if_reached(guess, x, Vector::permute(tables.threshold, guess));
      const auto line = (x - Vector::permute(tables.offset, row)) * Vector::permute(tables.steepness, row);
      k[part] = Vector::minimum(line, Vector::permute(tables.last, row));
      if (is_signed) k[part] = Vector::flip_sign(k[part], value);
    }
    Vector::store_codes<is_signed>(codes + i, k);
  }
  return i;
}
#endif

template <bool is_signed>
void decode_block(const uint8_t* codes, float scale, float* __restrict target, int64_t n) {
  int64_t i = 0;
#ifdef FUSEDOPT_INT8_VECTORS
  i = decode_vectors<is_signed>(codes, scale, target, n);
#endif
  for (; i < n; ++i) target[i] = tables_of<is_signed>.value[codes[i]] * scale;
}

// By their bits infinity is larger than any number, and NaN larger still.
FUSEDOPT_INLINE float largest_magnitude(const float* source, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, source + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float x;
  std::memcpy(&x, &largest, sizeof x);
  return x;
}

// `scale` holds the largest magnitude.
template <bool is_signed>
void encode_block(const float* __restrict source, uint8_t* __restrict codes, float* scale, int64_t n) {
  const bool is_zero = *scale < 0x1p-126f, is_finite = *scale < __builtin_inff();
  if (is_zero || !is_finite) {
    *scale = is_zero ? 0 : __builtin_nanf("");
    std::memset(codes, map_of<is_signed>.zero, size_t(n));
    return;
  }
  const float inverse = 1 / *scale;
  int64_t done = 0;
#ifdef FUSEDOPT_INT8_VECTORS
  done = encode_vectors<is_signed>(source, codes, inverse, n);
#endif
  encode_values<is_signed>(source + done, codes + done, inverse, n - done);
}

// The number of elements in the block that begins at `at`.
FUSEDOPT_INLINE int64_t block_length(int64_t at, int64_t n) { return n - at < int8_block ? n - at : int8_block; }

}  // namespace int8

// `n` elements, from the first of a block on, and the scales of their blocks.
FUSEDOPT_NOINLINE void decode_int8(bool is_signed, const uint8_t* codes, const float* scale, float* __restrict target,
                                   int64_t n) {
  const auto decode_block = is_signed ? int8::decode_block<true> : int8::decode_block<false>;
  for (int64_t at = 0; at < n; at += int8_block)
    decode_block(codes + at, scale[at / int8_block], target + at, int8::block_length(at, n));
}

FUSEDOPT_NOINLINE void encode_int8(bool is_signed, const float* __restrict source, uint8_t* codes, float* scale,
                                   int64_t n) {
  // All maxima before any codes: the codes of a block hide the wait for the next one's.
  for (int64_t at = 0; at < n; at += int8_block)
    scale[at / int8_block] = int8::largest_magnitude(source + at, int8::block_length(at, n));
  const auto encode_block = is_signed ? int8::encode_block<true> : int8::encode_block<false>;
  for (int64_t at = 0; at < n; at += int8_block)
    encode_block(source + at, codes + at, scale + at / int8_block, int8::block_length(at, n));
}

}  // namespace
}  // namespace fusedopt
