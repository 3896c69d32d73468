// The norm of gradients, deterministic: the same bits for any number of threads and any instruction set.
// The reference is fusedopt/_clip.py.
#pragma once

#include <cmath>
#include <vector>

#include "step.h"

namespace fusedopt {

// Squares are summed 1024 at a time by halves, a tensor padded with zeros; and so are the sums.
constexpr int64_t tree_size = 1024;

// A gradient, whose elements are multiplied by `scale` as they are read.
struct Squares {
  Operand grad;
  int64_t numel = 0;
  float scale = 1;
  int64_t trees() const { return (numel + tree_size - 1) / tree_size; }
};

namespace {

FUSEDOPT_INLINE float tree_sum(float* __restrict values) {
  for (int64_t half = tree_size / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

inline void square_sums(const Squares& squares, int64_t begin, int64_t end, float* sums) {
  Block<float> block;
  alignas(64) float values[tree_size];
  for (int64_t tree = begin; tree < end; ++tree) {
    for (int64_t at = 0; at < tree_size; at += block_size) {
      const int64_t left = squares.numel - tree * tree_size - at;
      const int64_t n = left < 0 ? 0 : left < block_size ? left : block_size;
      const float* grad = n ? block.read(squares.grad, tree * tree_size + at, n) : nullptr;
      for (int64_t i = 0; i < n; ++i) {
        const float value = grad[i] * squares.scale;
        values[at + i] = value * value;
      }
      for (int64_t i = n; i < block_size; ++i) values[at + i] = 0;
    }
    sums[tree] = tree_sum(values);
  }
}

}  // namespace

// The root of the sum of the trees' sums.
inline float norm_of(std::vector<float> sums) {
  while (sums.size() > 1) {
    const size_t trees = (sums.size() + tree_size - 1) / tree_size;
    sums.resize(trees * tree_size);
    for (size_t tree = 0; tree < trees; ++tree) sums[tree] = tree_sum(sums.data() + tree * tree_size);
    sums.resize(trees);
  }
  return sums.empty() ? 0.0f : std::sqrt(sums[0]);
}

// What gradients of this norm are multiplied by to have at most `max_norm`, as torch has it.
inline double clip_coefficient(float norm, double max_norm) {
  const double coefficient = max_norm / (double(norm) + 1e-6);
  return coefficient < 1 || coefficient != coefficient ? coefficient : 1.0;
}

}  // namespace fusedopt
