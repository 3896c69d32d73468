// Transposition in registers, and operands of the matrix product in the order in which its kernel reads them.
#pragma once

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <utility>

#include "matmul.h"
#include "rows.h"

namespace fusedopt {
namespace {

constexpr int lanes = register_bytes / sizeof(float);
constexpr std::make_integer_sequence<int, lanes> every_lane{};

FUSEDOPT_INLINE FloatVector load(const float* source) { return Reader<FloatVector>{0}(source); }
FUSEDOPT_INLINE void store(FloatVector value, float* target) { std::memcpy(target, &value, sizeof value); }

template <int... lane>
FUSEDOPT_INLINE FloatVector broadcast(float value, std::integer_sequence<int, lane...>) {
  return FloatVector{(static_cast<void>(lane), value)...};
}

// The lower or upper halves of two registers, interleaved.
template <bool upper, int... lane>
FUSEDOPT_INLINE FloatVector interleave(FloatVector a, FloatVector b, std::integer_sequence<int, lane...>) {
  constexpr int start = upper ? lanes / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (start + lane / 2 + lane % 2 * lanes)...);
#else
  typedef int IntVector __attribute__((vector_size(register_bytes)));
  return __builtin_shuffle(a, b, IntVector{(start + lane / 2 + lane % 2 * lanes)...});
#endif
}

// Transposes a square of `lanes` rows: each pass moves one bit of an element's row number into its column number.
FUSEDOPT_INLINE void transpose(FloatVector (&rows)[lanes]) {
#pragma GCC unroll 4
  for (int pass = 1; pass < lanes; pass *= 2) {
    FloatVector next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + lanes / 2], every_lane);
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + lanes / 2], every_lane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

FUSEDOPT_INLINE FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector sum) {
#if defined(__AVX512F__)
  return FloatVector(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(sum)));
#elif defined(__FMA__)
  return FloatVector(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(sum)));
#elif defined(__ARM_NEON)
  return FloatVector(vfmaq_f32(float32x4_t(sum), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + sum;
#endif
}

#if defined(__AVX512F__)
FUSEDOPT_INLINE __mmask16 lanes_between(int64_t begin, int64_t end) { return __mmask16((1u << end) - (1u << begin)); }
#endif

// Lanes [begin, end) alone: the memory beside them is not touched.
FUSEDOPT_INLINE FloatVector load_part(const float* source, int64_t begin, int64_t end) {
  if (end - begin == lanes) return load(source);
#if defined(__AVX512F__)
  return FloatVector(_mm512_maskz_loadu_ps(lanes_between(begin, end), source));
#else
  float element[lanes] = {};
  for (int64_t i = begin; i < end; ++i) element[i] = source[i];
  return load(element);
#endif
}
FUSEDOPT_INLINE void store_part(FloatVector value, int64_t begin, int64_t end, float* target) {
  if (end - begin == lanes) return store(value, target);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, lanes_between(begin, end), __m512(value));
#else
  float element[lanes];
  store(value, element);
  for (int64_t i = begin; i < end; ++i) target[i] = element[i];
#endif
}

// A word of a packed operand holds Format::inner values that follow each other along the inner dimension.
struct Float32 {
  static constexpr int inner = 1;

  // A register of words from values next to each other along the inner dimension.
  static FUSEDOPT_INLINE FloatVector join_along(const float* source) { return load(source); }
  // And from the values of `lanes` lines, one register for each place along the inner dimension.
  static FUSEDOPT_INLINE FloatVector join_across(const FloatVector* values) { return values[0]; }

  static FUSEDOPT_INLINE FloatVector add_product(FloatVector a, FloatVector b, FloatVector sum) {
    return multiply_add(a, b, sum);
  }
};

// Lines of an operand, rows of A or columns of B, of which `n` are wanted and `readable` there: word w of line i
// becomes word w * width + i % width of panel i / width. `width` is a multiple of `lanes`. Lines missing in the
// last panel are filled with anything, as their sums are not used; missing values are zeros.
template <class Format>
void pack(const float* source, int64_t line_stride, int64_t inner_stride, int64_t n, int64_t readable, int64_t inner,
          int64_t width, float* target) {
  constexpr int64_t together = lanes * Format::inner;
  const int64_t panel = (inner + Format::inner - 1) / Format::inner * width;
  const auto place = [&](int64_t line) { return target + line / width * panel + line % width; };
  if (inner_stride == 1) {
    for (int64_t line = 0; line < n; line += lanes) {
      const float* from[lanes];
      for (int i = 0; i < lanes; ++i) from[i] = source + (line + i < n ? line + i : n - 1) * line_stride;
      float* to = place(line);
      FloatVector words[lanes];
      int64_t k = 0;
      for (; k + together <= inner; k += together, to += lanes * width) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) words[i] = Format::join_along(from[i] + k);
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(words[i], to + i * width);
      }
      if (k == inner) continue;
      for (int i = 0; i < lanes; ++i) {
        float values[together] = {};
        std::memcpy(values, from[i] + k, size_t(inner - k) * sizeof(float));
        words[i] = Format::join_along(values);
      }
      transpose(words);
      for (int i = 0; k < inner; ++i, k += Format::inner) store(words[i], to + i * width);
    }
    return;
  }
  // Each row of lines in one go, as it lies in memory; the next ones are too far for the processor to foresee them.
  constexpr int64_t ahead = 16;
  for (int64_t k = 0, word = 0; k < inner; k += Format::inner, ++word)
    for (int64_t line = 0; line < n; line += lanes) {
      FloatVector values[Format::inner] = {};
#pragma GCC unroll 2
      for (int j = 0; j < Format::inner; ++j)
        if (k + j < inner) {
          const float* from = source + (k + j) * inner_stride + line;
          __builtin_prefetch(from + ahead * inner_stride);
          values[j] = load_part(from, 0, readable - line < lanes ? readable - line : lanes);
        }
      store(Format::join_across(values), place(line) + word * width);
    }
}

}  // namespace
}  // namespace fusedopt
