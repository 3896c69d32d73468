// How a warp's part of a tensor gets into shared memory and out of it: 16 bytes a thread where that is possible, else
// by elements. All else works on shared memory, where a part lies in one piece.
//
// A part is 256 elements, which is a block of an 8-bit state. A thread computes on 8 of them, in groups of 16 bytes of
// T: thread l on the groups l, 32 + l, ...
#pragma once

#include "arguments.h"

namespace fusedopt {
namespace {

constexpr int lanes = 32;
constexpr unsigned whole_warp = 0xffffffffu;
constexpr int share = 8;             // of a thread, in elements
constexpr int span = lanes * share;  // of a warp
static_assert(span == int8_block, "a warp has the whole block");

template <class T>
constexpr int group_size = 16 / int(sizeof(T));
template <class T>
constexpr int groups = share / group_size<T>;

struct Stored {
  char* data;
  int width;               // of an element, in bytes
  const int64_t* strides;  // of the walk
};

struct Part {
  int64_t begin, numel;
  bool whole;            // the tensor lies in one piece, aligned, and the part is in it to the end
  int dims;              // of the walk, 0 where elements lie one after another
  const int64_t* sizes;  // of the walk
  int lane;
};

template <class T>
__device__ __forceinline__ T* global(uint64_t address) {
  T* pointer = reinterpret_cast<T*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Division of 64 bits is a hundred instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

__device__ __forceinline__ int64_t place(const Part& part, const int64_t* strides, int64_t at) {
  if (!part.dims) return at;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = part.dims - 1; d > 0; --d) {
    const int64_t next = quotient(at, part.sizes[d]);
    offset += (at - next * part.sizes[d]) * strides[d];
    at = next;
  }
  return offset + at * strides[0];
}

template <class To>
__device__ __forceinline__ void copy(char* to, uint64_t from) {
  *reinterpret_cast<To*>(to) = *global<const To>(from);
}

template <class From>
__device__ __forceinline__ void copy(uint64_t to, const char* from) {
  *global<From>(to) = *reinterpret_cast<const From*>(from);
}

// float64 is read into float32 arithmetic as float32.
template <class T>
__device__ __forceinline__ int narrowed(int width) {
  return width < int(sizeof(T)) ? width : int(sizeof(T));
}

// Of a whole part. Only starts the copies: `__pipeline_wait_prior` and `__syncwarp` are to follow.
template <class T>
__device__ __forceinline__ void copy_in(const Part& part, const Stored& stored, char* buffer) {
  const char* from = stored.data + part.begin * stored.width;
#pragma unroll
  for (int i = 0; i < groups<T>; ++i) {
    const int at = (i * lanes + part.lane) * 16;
    if (at < span * stored.width)
      __pipeline_memcpy_async(buffer + at, global<const char>(reinterpret_cast<uint64_t>(from + at)), 16);
  }
}

template <class T>
__device__ __forceinline__ void copy_out(const Part& part, const Stored& stored, const char* buffer) {
  char* to = stored.data + part.begin * stored.width;
#pragma unroll
  for (int i = 0; i < groups<T>; ++i) {
    const int at = (i * lanes + part.lane) * 16;
    if (at < span * stored.width) copy<uint4>(reinterpret_cast<uint64_t>(to + at), buffer + at);
  }
}

template <class T>
__device__ __forceinline__ void copy_elements_in(const Part& part, const Stored& stored, char* buffer) {
  const int width = stored.width;
#pragma unroll 2
  for (int e = part.lane; e < span; e += lanes) {
    if (part.begin + e >= part.numel) break;
    const auto from = reinterpret_cast<uint64_t>(stored.data + place(part, stored.strides, part.begin + e) * width);
    char* to = buffer + e * narrowed<T>(width);
    if (width == 4)
      copy<uint32_t>(to, from);
    else if (width == 2)
      copy<uint16_t>(to, from);
    else if (width == 1)
      copy<uint8_t>(to, from);
    else if (sizeof(T) == 8)
      copy<uint64_t>(to, from);
    else
      *reinterpret_cast<float*>(to) = float(*global<const double>(from));
  }
}

template <class T>
__device__ __forceinline__ void copy_elements_out(const Part& part, const Stored& stored, const char* buffer) {
  const int width = stored.width;
#pragma unroll 1
  for (int e = part.lane; e < span; e += lanes) {
    if (part.begin + e >= part.numel) break;
    const auto to = reinterpret_cast<uint64_t>(stored.data + place(part, stored.strides, part.begin + e) * width);
    const char* from = buffer + e * narrowed<T>(width);
    if (width == 4)
      copy<uint32_t>(to, from);
    else if (width == 2)
      copy<uint16_t>(to, from);
    else if (width == 1)
      copy<uint8_t>(to, from);
    else if (sizeof(T) == 8)
      copy<uint64_t>(to, from);
    else
      *global<double>(to) = *reinterpret_cast<const float*>(from);
  }
}

// --- a thread's share of what lies in shared memory ---

// The position in the part of element j of the share of thread `lane`.
template <class T>
__device__ __forceinline__ int position(int lane, int j) {
  return (j / group_size<T> * lanes + lane) * group_size<T> + j % group_size<T>;
}

// A group of elements in one access.
template <class T, class Element>
struct alignas(sizeof(Element) * group_size<T> < 16 ? sizeof(Element) * group_size<T> : 16) Group {
  Element element[group_size<T>];
};

// Calls `one(element, j)` for each element of the share.
template <class T, class Element, class One>
__device__ __forceinline__ void get(const char* buffer, int lane, One one) {
#pragma unroll
  for (int i = 0; i < groups<T>; ++i) {
    const auto group = reinterpret_cast<const Group<T, Element>*>(buffer)[i * lanes + lane];
#pragma unroll
    for (int k = 0; k < group_size<T>; ++k) one(group.element[k], i * group_size<T> + k);
  }
}

// Writes `one(j)` as each element of the share.
template <class T, class Element, class One>
__device__ __forceinline__ void put(char* buffer, int lane, One one) {
#pragma unroll
  for (int i = 0; i < groups<T>; ++i) {
    Group<T, Element> group;
#pragma unroll
    for (int k = 0; k < group_size<T>; ++k) group.element[k] = Element(one(i * group_size<T> + k));
    reinterpret_cast<Group<T, Element>*>(buffer)[i * lanes + lane] = group;
  }
}

}  // namespace
}  // namespace fusedopt
