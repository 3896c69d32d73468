// A parameter of 16 bits: stochastic rounding, and the master copies that keep the bits it lacks.
// The reference is fusedopt/codecs.py, section "parameters"; both give the same bits.
#pragma once

#include <initializer_list>

#include "codecs.h"

namespace fusedopt {

// Of the random numbers of one parameter in one step.
struct Key {
  uint32_t first, second;
};

inline Key rounding_key(uint64_t seed, uint64_t step, uint64_t parameter) {
  uint64_t word = 0;
  for (const uint64_t number : {seed, step, parameter}) {
    word += number + 0x9e3779b97f4a7c15u;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
    word = (word ^ word >> 27) * 0x94d049bb133111ebu;
    word ^= word >> 31;
  }
  return {uint32_t(word), uint32_t(word >> 32)};
}

namespace {

FUSEDOPT_INLINE uint32_t mixed(uint32_t word) {
  word = (word ^ word >> 16) * 0x7feb352du;
  word = (word ^ word >> 15) * 0x846ca68bu;
  return word ^ word >> 16;
}

// The random bits of elements start, start + 1, ...; a block does not cross a multiple of 2^32.
class RandomWords {
 public:
  FUSEDOPT_INLINE RandomWords(const Key& key, int64_t start)
      : first_(uint32_t(start) + key.first + uint32_t(start >> 32) * 0x9e3779b9u), second_(key.second) {}
  FUSEDOPT_INLINE uint32_t operator[](int64_t i) const { return mixed(mixed(first_ + uint32_t(i)) + second_); }

 private:
  uint32_t first_, second_;
};

// Up with the probability of the dropped bits; from the largest finite number on to nearest.
FUSEDOPT_INLINE uint16_t to_bfloat16(float x, uint32_t word) {
  const uint32_t bits = bits_of(x);
  const bool small = (bits & 0x7fffffffu) < 0x7f7f0000u;
  return small ? uint16_t((bits + (word & 0xffffu)) >> 16) : to_bfloat16(x);
}

// Subnormal halves are the multiples of 2^-24.
FUSEDOPT_INLINE uint16_t to_float16(float x, uint32_t word) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + (word & 0x1fffu)) >> 13;
  const float multiple = float_of(magnitude < 0x38800000u ? magnitude : 0u) * 0x1p24f;
  const auto whole = int32_t(multiple);
  const bool up = multiple - float(whole) > float(int32_t(word >> 8)) * 0x1p-24f;
  const uint32_t half = magnitude < 0x38800000u ? uint32_t(whole) + up : normal;
  return magnitude < 0x477fe000u ? uint16_t(half | (bits >> 16 & 0x8000u)) : to_float16(x);
}

FUSEDOPT_NOINLINE void encode_stochastic(Storage storage, const float* __restrict source, uint16_t* __restrict target,
                                         int64_t n, int64_t start, const Key& key) {
  const RandomWords words(key, start);
  if (storage == Storage::bfloat16)
    for (int64_t i = 0; i < n; ++i) target[i] = to_bfloat16(source[i], words[i]);
  else
    for (int64_t i = 0; i < n; ++i) target[i] = to_float16(source[i], words[i]);
}

// A master copy of which the parameter is not the rounded form is out of date: the parameter's value replaces it.
FUSEDOPT_NOINLINE void keep_current(Storage storage, const float* __restrict param, float* __restrict master, int64_t n) {
  uint16_t stored[block_size];
  float rounded[block_size];
  encode(storage, master, stored, nullptr, n);
  decode(storage, stored, nullptr, rounded, n);
  for (int64_t i = 0; i < n; ++i) master[i] = rounded[i] == param[i] ? master[i] : param[i];
}

// float32 from bfloat16 and the next 16 or 8 bits, a signed number. Beyond zero and infinity, where only bits that were
// left below another parameter lead, lies NaN.
template <class Low>
FUSEDOPT_INLINE float joined(float value, Low low) {
  constexpr int shift = 16 - 8 * int(sizeof(Low));
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const int32_t next = low;
  const bool beyond = (magnitude == 0 && next < 0) || (magnitude == 0x7f800000u && next > 0);
  return float_of(bits + (beyond ? 0u : uint32_t(next) << shift));
}

template <class Low>
void join(const Low* __restrict low, float* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = joined(values[i], low[i]);
}

FUSEDOPT_NOINLINE void join(Storage storage, const char* low, float* values, int64_t n) {
  if (storage == Storage::low16)
    join(reinterpret_cast<const int16_t*>(low), values, n);
  else
    join(reinterpret_cast<const int8_t*>(low), values, n);
}

// `bits` as bfloat16, rounded with ties away from zero so that the remainder fits its signed type, and the remainder.
template <class Low>
FUSEDOPT_INLINE void split(float x, uint32_t bits, uint16_t& high, Low& low) {
  constexpr int width = 8 * int(sizeof(Low));
  const uint32_t rounded = (bits + (1u << (width - 1))) >> width;
  high = x != x ? uint16_t(0x7fc0u) : uint16_t(rounded);
  low = x != x ? Low(0) : Low(bits - (rounded << width));
}

// The upper 24 bits, rounded to nearest, ties to even, or by a random word.
FUSEDOPT_INLINE uint32_t to_24_bits(float x) {
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fu + (bits >> 8 & 1u)) >> 8;
}
FUSEDOPT_INLINE uint32_t to_24_bits(float x, uint32_t word) {
  const uint32_t bits = bits_of(x);
  const bool small = (bits & 0x7fffffffu) < 0x7f7fff00u;
  return small ? (bits + (word & 0xffu)) >> 8 : to_24_bits(x);
}

FUSEDOPT_NOINLINE void split(Storage storage, const float* __restrict source, uint16_t* __restrict high, char* low,
                             int64_t n, int64_t start, const Key* key) {
  if (storage == Storage::low16) {
    auto* __restrict remainder = reinterpret_cast<int16_t*>(low);
    for (int64_t i = 0; i < n; ++i) split(source[i], bits_of(source[i]), high[i], remainder[i]);
    return;
  }
  auto* __restrict remainder = reinterpret_cast<int8_t*>(low);
  if (!key) {
    for (int64_t i = 0; i < n; ++i) split(source[i], to_24_bits(source[i]), high[i], remainder[i]);
    return;
  }
  const RandomWords words(*key, start);
  for (int64_t i = 0; i < n; ++i) split(source[i], to_24_bits(source[i], words[i]), high[i], remainder[i]);
}

}  // namespace
}  // namespace fusedopt
