// Tensors of rows, read and written a block at a time, for the operations that work along the last dimension.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "step.h"

namespace fusedopt {

// A tensor's last dimension is a row; the others, merged where they lie evenly, are walked in row-major order.
struct Rows {
  char* data = nullptr;  // none for an operand that is not there
  Storage storage = Storage::float32;
  int64_t step = 1;  // between elements of a row, in elements, as are strides
  int dims = 1;
  int64_t size[max_dims], stride[max_dims];

  char* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += index % size[d] * stride[d];
      index /= size[d];
    }
    return at(data, offset + index * stride[0]);
  }
  char* at(char* row, int64_t offset) const { return row + offset * element_size(storage); }
};

namespace {

template <class Word>
FUSEDOPT_INLINE void gather(const char* source, int64_t step, int64_t n, char* target) {
  const Word* __restrict from = reinterpret_cast<const Word*>(source);
  Word* __restrict to = reinterpret_cast<Word*>(target);
  if (step == 2)  // interleaved; the compiler knows how to shuffle a constant step
    for (int64_t i = 0; i < n; ++i) to[i] = from[2 * i];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}

template <class Word>
FUSEDOPT_INLINE void scatter(const char* source, int64_t step, int64_t n, char* target) {
  const Word* __restrict from = reinterpret_cast<const Word*>(source);
  Word* __restrict to = reinterpret_cast<Word*>(target);
  for (int64_t i = 0; i < n; ++i) to[i * step] = from[i];
}

// One block of a row in the arithmetic type: the tensor's own memory where that is its format, else a copy.
template <class T>
class RowBlock {
 public:
  const T* read(const Rows& rows, char* row, int64_t start, int64_t n) { return read(rows, row, start, n, values_); }

  // In `copy` where it is one.
  const T* read(const Rows& rows, char* row, int64_t start, int64_t n, T* copy) {
    const char* source = rows.at(row, start * rows.step);
    if (in_place(rows)) return reinterpret_cast<const T*>(source);
    if (rows.step != 1) {
      switch (element_size(rows.storage)) {
        case 2: gather<uint16_t>(source, rows.step, n, packed_); break;
        case 4: gather<uint32_t>(source, rows.step, n, packed_); break;
        default: gather<uint64_t>(source, rows.step, n, packed_);
      }
      source = packed_;
    }
    decode(rows.storage, source, nullptr, copy, n);
    return copy;
  }

  // Where values are to be computed; `write` then brings them into the tensor.
  T* place(const Rows& rows, char* row, int64_t start) {
    return in_place(rows) ? reinterpret_cast<T*>(rows.at(row, start)) : values_;
  }
  void write(const Rows& rows, char* row, int64_t start, int64_t n) {
    if (in_place(rows)) return;
    char* target = rows.at(row, start * rows.step);
    if (rows.step == 1) {
      encode(rows.storage, values_, target, nullptr, n);
      return;
    }
    encode(rows.storage, values_, packed_, nullptr, n);
    switch (element_size(rows.storage)) {
      case 2: scatter<uint16_t>(packed_, rows.step, n, target); break;
      case 4: scatter<uint32_t>(packed_, rows.step, n, target); break;
      default: scatter<uint64_t>(packed_, rows.step, n, target);
    }
  }

  static bool in_place(const Rows& rows) { return rows.step == 1 && rows.storage == native_storage<T>; }

 private:
  alignas(64) T values_[block_size];
  alignas(64) char packed_[block_size * sizeof(double)];
};

// The blocks of a row for two passes over it. Copies of the first ones, as many as leave room in L1, are made once.
template <class T>
class RowTwice {
 public:
  const T* first(const Rows& rows, char* row, int64_t start, int64_t n) {
    return start + n <= kept ? block_.read(rows, row, start, n, copies_ + start) : block_.read(rows, row, start, n);
  }
  const T* again(const Rows& rows, char* row, int64_t start, int64_t n) {
    return start + n <= kept && !block_.in_place(rows) ? copies_ + start : block_.read(rows, row, start, n);
  }

 private:
  static constexpr int64_t kept = 16384 / sizeof(T);
  RowBlock<T> block_;
  alignas(64) T copies_[kept];
};

// Rounds `n` values, at most block_size, to a storage format and back.
template <class T>
void round_to(Storage storage, T* values, int64_t n) {
  if (storage == native_storage<T> || storage == Storage::float64) return;
  alignas(64) char packed[block_size * sizeof(double)];
  encode(storage, values, packed, nullptr, n);
  decode(storage, packed, nullptr, values, n);
}

// Reads the operands of one term of a sum: a register of them, or the single one of a row's end.
template <class Value>
struct Reader {
  int64_t i;
  template <class T>
  FUSEDOPT_INLINE Value operator()(const T* source) const {
    Value value;
    std::memcpy(&value, source + i, sizeof value);
    return value;
  }
};

// The sum of term(0) ... term(n - 1). Term i goes to lane i mod `lanes`, and the lanes are added by halves, so the
// order does not depend on the width of a register. `term` takes a reader.
template <class T, class Term>
FUSEDOPT_INLINE T lane_sum(int64_t n, Term term) {
  constexpr int lanes = 256 / sizeof(T), width = register_bytes / sizeof(T), registers = lanes / width;
  using Vector = std::conditional_t<sizeof(T) == sizeof(float), FloatVector, DoubleVector>;
  Vector sums[registers] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma GCC unroll 16
    for (int k = 0; k < registers; ++k) sums[k] += term(Reader<Vector>{i + k * width});
  T lane[lanes];
  std::memcpy(lane, sums, sizeof lane);
  for (int k = 0; i + k < n; ++k) lane[k] += term(Reader<T>{i + k});
#pragma GCC unroll 6
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}

}  // namespace
}  // namespace fusedopt
