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

// As in codecs.py: magnitude k is slope[row] * k + offset[row], and its code zero + k, or zero - k for a negative number.
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

// A row is found by its number modulo 8, the entries that a permutation of one register holds. So rows 0 and 8, which
// hold one number each, share an entry: the line through both.
struct Int8Tables {
  float value[256];                                      // by code
  float slope[8], offset[8];                             // by row; the slope for multiples of `unit`
  float threshold[8], steepness[8], origin[8], last[8];  // by first_guess
  float unit;
};

// Encoding guesses the row from the upper half of the bits of x, nearly a logarithm: a decade is 65536 / 154 of them.
// The guess, less `guess_of_zero`, is the row or one less, because it steps amid a row: at 6.6e-7, 6.5e-6, ... 0.67.
// At the smallest x it is right, and below there is only row 0.
constexpr int guess_factor = 154, guess_of_zero = 31;
constexpr float smallest = 1e-7f;

constexpr Int8Tables int8_tables(const DynamicMap& map) {
  Int8Tables tables{};
  for (int code = 0; code < 256; ++code) {
    const int k = code - map.zero;
    tables.value[code] = k < 0 ? -magnitude(map, -k) : magnitude(map, k);
  }
  // Of (k or k + 1) * unit the exponent is the row modulo 8.
  tables.unit = map.zero ? 4 : 2;
  for (int row = 0; row < 8; ++row) {
    const int guess = (row + guess_of_zero) % 8, next = map.first[row + 1], top = map.first[8];
    tables.slope[row] = (row ? map.slope[row] : 1 / float(top)) / tables.unit;
    tables.offset[row] = map.offset[row];
    tables.threshold[guess] = (magnitude(map, next - 1) + magnitude(map, next)) * 0.5f;
    tables.steepness[guess] = row ? 1 / map.slope[row] : float(top);
    tables.origin[guess] = map.offset[row];
    tables.last[guess] = float(row ? next - 1 : top);
  }
  return tables;
}

template <bool is_signed>
alignas(64) constexpr Int8Tables tables_of = int8_tables(is_signed ? signed_map : unsigned_map);

// What the codec needs of an instruction set, for `width` elements at a time. Arithmetic on Floats is by operators.
struct Scalar {
  using Floats = float;
  using Words = uint32_t;
  static constexpr int width = 1, group = 1;

  static Floats all(float x) { return x; }
  static Floats load(const float* source) { return *source; }
  static Floats permute(const float* table, Words index) { return table[index & 7]; }
  static Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
  static Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
  static Floats magnitude(Floats x) { return abs(x); }
  static Floats with_sign(Floats x, Floats sign) { return __builtin_copysignf(x, sign); }
  // The upper half of the bits times `factor`, the upper half of that.
  static Words guess(Floats x, int factor) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits >> 16) * uint32_t(factor) >> 16;
  }
  static Words next_if_reached(Words row, Floats x, Floats threshold) { return row + (x >= threshold); }
  template <bool is_signed>
  static void store(uint8_t* codes, const Floats* k) {
    const int rounded = int(__builtin_lrintf(*k));
    *codes = uint8_t(is_signed ? 127 - (rounded < 127 ? rounded : 127) : rounded);
  }
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
struct Vector {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int width = 16, group = 4;

  static FUSEDOPT_INLINE Floats all(float x) { return _mm512_set1_ps(x); }
  static FUSEDOPT_INLINE Floats load(const float* source) { return _mm512_loadu_ps(source); }
  static FUSEDOPT_INLINE void store(float* target, Floats x) { _mm512_storeu_ps(target, x); }
  static FUSEDOPT_INLINE Floats permute(const float* table, Words index) {
    return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
  }
  static FUSEDOPT_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static FUSEDOPT_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static FUSEDOPT_INLINE Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
  static FUSEDOPT_INLINE Floats with_sign(Floats x, Floats sign) {
    return _mm512_or_ps(x, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats flip_sign(Floats x, Floats sign) {
    return _mm512_xor_ps(x, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static FUSEDOPT_INLINE Words guess(Floats x, int factor) {
    return _mm512_srli_epi32(_mm512_mulhi_epu16(_mm512_castps_si512(x), _mm512_set1_epi32(factor << 16)), 16);
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
  static FUSEDOPT_INLINE void store(uint8_t* codes, const Floats* k) {
    for (int i = 0; i < 4; ++i) {
      const __m512i rounded = _mm512_cvtps_epi32(k[i]);
      const __m128i bytes = is_signed ? _mm_xor_si128(_mm512_cvtsepi32_epi8(rounded), _mm_set1_epi8(127))
                                      : _mm512_cvtepi32_epi8(rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * width), bytes);
    }
  }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Vector {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int width = 8, group = 4;

  static FUSEDOPT_INLINE Floats all(float x) { return _mm256_set1_ps(x); }
  static FUSEDOPT_INLINE Floats load(const float* source) { return _mm256_loadu_ps(source); }
  static FUSEDOPT_INLINE void store(float* target, Floats x) { _mm256_storeu_ps(target, x); }
  static FUSEDOPT_INLINE Floats permute(const float* table, Words index) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  }
  static FUSEDOPT_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static FUSEDOPT_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static FUSEDOPT_INLINE Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static FUSEDOPT_INLINE Floats with_sign(Floats x, Floats sign) {
    return _mm256_or_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats flip_sign(Floats x, Floats sign) {
    return _mm256_xor_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  static FUSEDOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static FUSEDOPT_INLINE Words guess(Floats x, int factor) {
    return _mm256_srli_epi32(_mm256_mulhi_epu16(_mm256_castps_si256(x), _mm256_set1_epi32(factor << 16)), 16);
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
  static FUSEDOPT_INLINE void store(uint8_t* codes, const Floats* k) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(k[0]), _mm256_cvtps_epi32(k[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(k[2]), _mm256_cvtps_epi32(k[3]));
    __m256i bytes = is_signed ? _mm256_xor_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(127))
                              : _mm256_packus_epi16(low, high);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  }
};
#else
using Vector = Scalar;
#endif

// Reads whole vectors, and returns how many elements.
template <bool is_signed, class Lanes>
int64_t decode_lanes(const uint8_t* codes, float scale, float* __restrict target, int64_t n) {
  constexpr const Int8Tables& tables = tables_of<is_signed>;
  constexpr float unit = tables.unit, zero = unit * (0x1p23f + (is_signed ? signed_map : unsigned_map).zero);
  int64_t i = 0;
  for (; i + Lanes::width <= n; i += Lanes::width) {
    const auto raised = Lanes::load_codes(codes + i, unit);
    const auto k = raised - Lanes::all(zero);
    const auto row = Lanes::exponent(is_signed ? k : raised - Lanes::all(zero - unit));
    auto offset = Lanes::permute(tables.offset, row);
    if (is_signed) offset = Lanes::flip_sign(offset, k);
    Lanes::store(target + i, Lanes::multiply_add(Lanes::permute(tables.slope, row), k, offset) * Lanes::all(scale));
  }
  return i;
}

template <bool is_signed>
void decode_block(const uint8_t* codes, float scale, float* __restrict target, int64_t n) {
  int64_t i = 0;
  if constexpr (Vector::width > 1) i = decode_lanes<is_signed, Vector>(codes, scale, target, n);
  for (; i < n; ++i) target[i] = tables_of<is_signed>.value[codes[i]] * scale;
}

// Writes whole groups of elements, and returns how many.
template <bool is_signed, class Lanes>
int64_t encode_lanes(const float* __restrict source, uint8_t* codes, float inverse, int64_t n) {
  constexpr const Int8Tables& tables = tables_of<is_signed>;
  int64_t i = 0;
  for (; i + Lanes::width * Lanes::group <= n; i += Lanes::width * Lanes::group) {
    typename Lanes::Floats k[Lanes::group];
    for (int part = 0; part < Lanes::group; ++part) {
      // Negated where signed, since -128 fits a signed byte and 128 does not.
      const auto value = Lanes::load(source + i + part * Lanes::width) * Lanes::all(is_signed ? -inverse : inverse);
      const auto x = Lanes::maximum(is_signed ? Lanes::magnitude(value) : value, Lanes::all(smallest));
      const auto guess = Lanes::guess(x, guess_factor);
      const auto row = Lanes::next_if_reached(guess, x, Lanes::permute(tables.threshold, guess));
      k[part] = (x - Lanes::permute(tables.origin, row)) * Lanes::permute(tables.steepness, row);
      k[part] = Lanes::minimum(k[part], Lanes::permute(tables.last, row));
      if (is_signed) k[part] = Lanes::with_sign(k[part], value);
    }
    Lanes::template store<is_signed>(codes + i, k);
  }
  return i;
}

template <bool is_signed>
void encode_block(const float* __restrict source, uint8_t* codes, float* scale, int64_t n) {
  constexpr int32_t smallest_normal = 0x00800000, infinity = 0x7f800000;
  int32_t largest = 0;  // as bits, where infinity is larger than any number, and NaN larger still
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, source + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  if (largest < smallest_normal || largest >= infinity) {
    *scale = largest < smallest_normal ? 0 : __builtin_nanf("");
    std::memset(codes, (is_signed ? signed_map : unsigned_map).zero, size_t(n));
    return;
  }
  std::memcpy(scale, &largest, sizeof largest);
  const float inverse = 1 / *scale;
  const int64_t done = encode_lanes<is_signed, Vector>(source, codes, inverse, n);
  encode_lanes<is_signed, Scalar>(source + done, codes + done, inverse, n - done);
}

// `n` elements from the first of a block on, and the scales of their blocks.
FUSEDOPT_NOINLINE void decode_int8(bool is_signed, const uint8_t* codes, const float* scale, float* __restrict target,
                                   int64_t n) {
  for (int64_t at = 0; at < n; at += int8_block, ++scale) {
    const int64_t count = n - at < int8_block ? n - at : int8_block;
    (is_signed ? decode_block<true> : decode_block<false>)(codes + at, *scale, target + at, count);
  }
}

FUSEDOPT_NOINLINE void encode_int8(bool is_signed, const float* __restrict source, uint8_t* codes, float* scale,
                                   int64_t n) {
  for (int64_t at = 0; at < n; at += int8_block, ++scale) {
    const int64_t count = n - at < int8_block ? n - at : int8_block;
    (is_signed ? encode_block<true> : encode_block<false>)(source + at, codes + at, scale, count);
  }
}

}  // namespace
}  // namespace fusedopt
