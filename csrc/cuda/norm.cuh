// The norm of gradients, by the same trees of sums as in norm.h.
#pragma once

#include "step.cuh"

namespace fusedopt {
namespace {

constexpr int tree = tree_words;
constexpr int leaves = tree / lanes;        // of a thread
constexpr int trees = cuda_threads / lanes;  // of a block of threads: one for each warp

// Adds the upper half to the lower until `count` numbers are `left`.
template <int count, int left>
__device__ __forceinline__ void fold(float* numbers) {
  if constexpr (count > left) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) numbers[i] += numbers[i + count / 2];
    fold<count / 2, left>(numbers);
  }
}

// The sum of a tree whose leaf (c * 32 + lane) * neighbours + k is a thread's leaf c * neighbours + k.
template <int neighbours>
__device__ __forceinline__ float tree_sum(float* leaf) {
  fold<leaves, neighbours>(leaf);
#pragma unroll
  for (int level = 1; level <= 5; ++level)
#pragma unroll
    for (int k = 0; k < neighbours; ++k) leaf[k] += __shfl_xor_sync(whole_warp, leaf[k], lanes >> level);
  fold<neighbours, 1>(leaf);
  return leaf[0];
}

__device__ __forceinline__ float squared(float x, float scale) {
  x *= scale;
  return x * x;
}

// Of a whole tree, aligned: 16 bytes at a time.
template <class Element, class Decode>
__device__ __forceinline__ float whole_tree(uint64_t data, int lane, float scale, Decode decode) {
  constexpr int neighbours = 16 / int(sizeof(Element));
  uint4 chunk[leaves / neighbours];
#pragma unroll
  for (int c = 0; c < leaves / neighbours; ++c)
    chunk[c] = __ldg(reinterpret_cast<const uint4*>(data) + (c * lanes + lane));
  float leaf[leaves];
#pragma unroll
  for (int c = 0; c < leaves / neighbours; ++c) {
    Element element[neighbours];
    memcpy(element, &chunk[c], sizeof chunk[c]);
#pragma unroll
    for (int k = 0; k < neighbours; ++k) leaf[c * neighbours + k] = squared(decode(element[k]), scale);
  }
  return tree_sum<neighbours>(leaf);
}

template <class Element, class Decode>
__device__ __forceinline__ float any_tree(uint64_t data, int64_t left, int lane, float scale, Decode decode) {
  float leaf[leaves];
#pragma unroll
  for (int i = 0; i < leaves; ++i) {
    const int at = i * lanes + lane;
    leaf[i] = at < left ? squared(decode(__ldg(reinterpret_cast<const Element*>(data) + at)), scale) : 0;
  }
  return tree_sum<1>(leaf);
}

// `data`: of the tree's first element; `left`: elements from there on.
template <class Element, class Decode>
__device__ __forceinline__ float squares(bool aligned, uint64_t data, int64_t left, int lane, float scale,
                                         Decode decode) {
  return aligned && left >= tree ? whole_tree<Element>(data, lane, scale, decode)
                                 : any_tree<Element>(data, left, lane, scale, decode);
}

__device__ __forceinline__ void square_sums(const NormArguments& arguments) {
  const NormHead& head = arguments.head;
  const int64_t number = int64_t(blockIdx.x) * trees + int(threadIdx.x) / lanes;
  if (number >= head.trees) return;
  const int64_t* table = head.table ? global<const int64_t>(head.table) : arguments.words;
  const int64_t* row = find_row(table, head.rows, norm_width, 1, number);
  const int lane = int(threadIdx.x) % lanes;
  const int64_t own = number - row[1], left = row[0] - own * tree;
  const uint64_t data = uint64_t(row[2]) + uint64_t(own * tree * element_size(head.grad));
  const auto scale = float(*global<const double>(head.control));
  float sum;
  if (head.grad == Storage::float32)
    sum = squares<float>(head.aligned, data, left, lane, scale, [](float x) { return x; });
  else if (head.grad == Storage::bfloat16)
    sum = squares<uint16_t>(head.aligned, data, left, lane, scale, [](uint16_t x) { return from_bfloat16(x); });
  else if (head.grad == Storage::float16)
    sum = squares<uint16_t>(head.aligned, data, left, lane, scale, [](uint16_t x) { return widen_float16(x); });
  else
    sum = squares<double>(head.aligned, data, left, lane, scale, [](double x) { return float(x); });
  if (lane == 0) global<float>(head.sums)[row[3] + own] = sum;
}

__device__ __forceinline__ void sums_of_sums(const SumArguments& given) {
  const int64_t number = int64_t(blockIdx.x) * trees + int(threadIdx.x) / lanes;
  const int lane = int(threadIdx.x) % lanes;
  const int64_t first = number * tree;
  if (number > 0 && first >= given.count) return;
  float leaf[leaves];
#pragma unroll
  for (int i = 0; i < leaves; ++i) {
    const int64_t at = first + i * lanes + lane;
    leaf[i] = at < given.count ? __ldg(reinterpret_cast<const float*>(given.sums) + at) : 0;
  }
  const float sum = tree_sum<1>(leaf);
  if (lane != 0) return;
  if (given.next) {
    global<float>(given.next)[number] = sum;
    return;
  }
  if (number > 0) return;
  const float norm = sqrt(sum);
  const double coefficient = given.max_norm / (double(norm) + 1e-6);
  const double* control = global<const double>(given.control_in);
  *global<float>(given.norm) = norm;
  global<double>(given.control_out)[0] = control[0] * (coefficient >= 1 ? 1.0 : coefficient);  // NaN stays NaN
  global<double>(given.control_out)[1] = control[1];
}

}  // namespace
}  // namespace fusedopt
