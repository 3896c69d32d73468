// The batched matrix product out = alpha C + beta A B, as its threads and the kernels of each instruction set see it.
#pragma once

#include "step.h"

namespace fusedopt {

// A matrix of each batch; strides are in elements.
struct Matrices {
  const float* data = nullptr;  // none for an operand that is not there
  int64_t batch_stride, row_stride, column_stride;

  const float* at(int64_t batch, int64_t row, int64_t column) const {
    return data + batch * batch_stride + row * row_stride + column * column_stride;
  }
};

struct Matmul {
  int64_t batches, rows, columns, inner;
  Matrices a, b, c;  // one of the last two strides of a, and of b, is 1
  float* out;
  int64_t out_batch_stride, out_row_stride;  // its columns are next to each other
  float alpha, beta;
  bool symmetric;  // the result; what lies below its diagonal is a copy

  float* out_at(int64_t batch, int64_t row, int64_t column) const {
    return out + batch * out_batch_stride + row * out_row_stride + column;
  }
};

// A rectangle of the result, computed by one thread.
struct MatmulTile {
  int64_t row, rows, column, columns;
};

// Of the inner dimension, what is packed at a time, in words of 32 bits; and the columns of a tile at most. Packed,
// they fit a core's second cache. Sums are rounded at multiples of matmul_depth, so the result depends on it.
constexpr int64_t matmul_depth = 384, matmul_columns = 512;

// Rows that are packed at a time at most.
constexpr int64_t matmul_rows = 16;

// A thread's memory for both, in elements; it is aligned to 64 bytes.
constexpr int64_t matmul_workspace = matmul_depth * (matmul_columns + matmul_rows);

}  // namespace fusedopt
