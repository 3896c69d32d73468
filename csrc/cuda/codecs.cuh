// A thread's share of a part in shared memory, read into the arithmetic type and written back. The reference is
// fusedopt/codecs.py; both give the same bits.
#pragma once

#include "../parameter.h"
#include "memory.cuh"

namespace fusedopt {
namespace {

// --- floats ---

#if defined(__CUDA_ARCH__)
// The same conversions in hardware; NaN gets another payload.
__device__ __forceinline__ uint16_t round_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t round_to_float16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float widen_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
#else
inline uint16_t round_to_bfloat16(float x) { return to_bfloat16(x); }
inline uint16_t round_to_float16(float x) { return to_float16(x); }
inline float widen_float16(uint16_t bits) { return from_float16(bits); }
#endif

template <class T>
__device__ __forceinline__ void decode_float(Storage storage, const char* buffer, int lane, T* values) {
  if (storage == Storage::bfloat16)
    get<T, uint16_t>(buffer, lane, [&](uint16_t x, int j) { values[j] = from_bfloat16(x); });
  else if (storage == Storage::float16)
    get<T, uint16_t>(buffer, lane, [&](uint16_t x, int j) { values[j] = widen_float16(x); });
  else if (sizeof(T) == 8 && storage == Storage::float64)
    get<T, double>(buffer, lane, [&](double x, int j) { values[j] = T(x); });
  else
    get<T, float>(buffer, lane, [&](float x, int j) { values[j] = x; });
}

template <class T>
__device__ __forceinline__ void encode_float(Storage storage, const T* values, char* buffer, int lane) {
  if (storage == Storage::bfloat16)
    put<T, uint16_t>(buffer, lane, [&](int j) { return round_to_bfloat16(float(values[j])); });
  else if (storage == Storage::float16)
    put<T, uint16_t>(buffer, lane, [&](int j) { return round_to_float16(float(values[j])); });
  else if (sizeof(T) == 8 && storage == Storage::float64)
    put<T, double>(buffer, lane, [&](int j) { return double(values[j]); });
  else
    put<T, float>(buffer, lane, [&](int j) { return float(values[j]); });
}

// --- 8 bits ---

// What is looked up, in shared memory: by rows as in int8.h, but what follows the row is read in one access.
struct Int8Tables {
  struct Map {
    float value[256], threshold[8];
    float4 row[9];  // offset, steepness, last; row 8 is row 0
  } maps[2];        // signed, unsigned
};

#if defined(__CUDA_ARCH__)
__device__
#endif
    const int8::Tables int8_tables[2] = {int8::tables_from(int8::signed_map), int8::tables_from(int8::unsigned_map)};

__device__ __forceinline__ void fill(Int8Tables& tables, int thread, int threads) {
  for (int map = 0; map < 2; ++map) {
    const int8::Tables& source = int8_tables[map];
    Int8Tables::Map& target = tables.maps[map];
    for (int i = thread; i < 256; i += threads) target.value[i] = source.value[i];
    if (thread < 8) target.threshold[thread] = source.threshold[thread];
    if (thread < 9)
      target.row[thread] =
          make_float4(source.offset[thread % 8], source.steepness[thread % 8], source.last[thread % 8], 0);
  }
}

template <class T>
__device__ __forceinline__ void decode_int8(const Int8Tables::Map& map, float scale, const char* buffer, int lane,
                                            T* values) {
  get<T, uint8_t>(buffer, lane, [&](uint8_t code, int j) { values[j] = map.value[code] * scale; });
}

// `inverse` of the scale, negated where signed, since a signed byte holds -128 and not 128; 0 for a block that holds no
// numbers.
__device__ __forceinline__ uint32_t int8_code(const Int8Tables::Map& map, bool is_signed, float value, float inverse) {
  const float x = value * inverse;
  // From 2^-23 on a row is guessed from the bits, nearly a logarithm: times 158 / 2^32 they count decades, from 32 on.
  // The guess is the row or the one before, for it steps amid a row. Below there is only row 0. NaN counts as 0.
  const float size = fmaxf(is_signed ? abs(x) : x, 0x1p-23f);
  const int guess = int(__umulhi(bits_of(size), 158u));
  const float4 line = map.row[guess - 32 + (size >= map.threshold[guess - 32])];
  // Thresholds are high enough for k to reach the row's first.
  float k = fminf((size - line.x) * line.y, line.z);
  if (is_signed) k = fminf(float_of(bits_of(k) ^ (bits_of(x) & 0x80000000u)), 127.0f);
  // Leaves no bits for a fraction, and the whole number in the last ones.
  return bits_of(k + 0x1.8p23f) ^ (is_signed ? 127u : 0u);
}

// Returns the scale.
template <class T>
__device__ __forceinline__ float encode_int8(const Int8Tables::Map& map, bool is_signed, const T* values, char* buffer,
                                             int lane) {
  // By their bits infinity is larger than any number, and NaN larger still.
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < share; ++j) {
    const uint32_t magnitude = bits_of(float(values[j])) & 0x7fffffffu;
    largest = largest > magnitude ? largest : magnitude;
  }
  largest = __reduce_max_sync(whole_warp, largest);
  const bool is_zero = largest < 0x00800000u, is_finite = largest < 0x7f800000u;
  const float scale = float_of(is_zero ? 0u : is_finite ? largest : 0x7fc00000u);
  const float inverse = is_zero || !is_finite ? 0.0f : (is_signed ? -1.0f : 1.0f) / scale;
  if (is_signed)
    put<T, uint8_t>(buffer, lane, [&](int j) { return int8_code(map, true, float(values[j]), inverse); });
  else
    put<T, uint8_t>(buffer, lane, [&](int j) { return int8_code(map, false, float(values[j]), inverse); });
  return scale;
}

// --- parameters of 16 bits ---

// A float32 master copy of which the parameter is not the rounded form is out of date: the parameter's value counts.
__device__ __forceinline__ void decode_master(Storage param, Storage master, const char* buffer, int lane,
                                              float* values) {
  if (master == Storage::low16)
    get<float, int16_t>(buffer, lane, [&](int16_t low, int j) { values[j] = joined(values[j], low); });
  else if (master == Storage::low8)
    get<float, int8_t>(buffer, lane, [&](int8_t low, int j) { values[j] = joined(values[j], low); });
  else
    get<float, float>(buffer, lane, [&](float x, int j) {
      const float rounded = param == Storage::bfloat16 ? from_bfloat16(round_to_bfloat16(x))
                                                       : widen_float16(round_to_float16(x));
      values[j] = rounded == values[j] ? x : values[j];
    });
}

// `random` numbers the elements from that of position 0 on.
__device__ __forceinline__ void encode_stochastic(Storage param, const RandomWords& random, const float* values,
                                                  char* buffer, int lane) {
  const auto word = [&](int j) { return random[position<float>(lane, j)]; };
  if (param == Storage::bfloat16)
    put<float, uint16_t>(buffer, lane, [&](int j) { return to_bfloat16(values[j], word(j)); });
  else
    put<float, uint16_t>(buffer, lane, [&](int j) { return to_float16(values[j], word(j)); });
}

__device__ __forceinline__ void encode_split(Storage master, bool stochastic, const RandomWords& random,
                                             const float* values, char* buffer, char* low_buffer, int lane) {
  uint16_t high[share];
  if (master == Storage::low16) {
    put<float, int16_t>(low_buffer, lane, [&](int j) {
      int16_t low;
      split(values[j], bits_of(values[j]), high[j], low);
      return low;
    });
  } else {
    put<float, int8_t>(low_buffer, lane, [&](int j) {
      int8_t low;
      const float x = values[j];
      split(x, stochastic ? to_24_bits(x, random[position<float>(lane, j)]) : to_24_bits(x), high[j], low);
      return low;
    });
  }
  put<float, uint16_t>(buffer, lane, [&](int j) { return high[j]; });
}

}  // namespace
}  // namespace fusedopt
