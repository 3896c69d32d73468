// RMS normalization of rows, forward and backward: deterministic, the same bits for any number of threads and any
// instruction set. The reference is fusedopt/_rms_norm.py.
#pragma once

#include "rows.h"

namespace fusedopt {

struct RmsNorm {
  int64_t columns = 0;
  Rows x, residual, total;           // forward: total = x + residual where there is one; backward: x is the total
  Rows y, grad_y, grad_total, grad_x;
  const void* weight = nullptr;      // with its offset, in the arithmetic type
  void* rstd = nullptr;              // of each row, in the arithmetic type; forward: null where it is not wanted
  double eps = 0;
  Storage normalized = Storage::float32, product = Storage::float32;  // what x * rstd and its product are rounded to
  bool rounds_statistics = false;    // to x's storage, as torch would operation by operation
};

namespace {

template <class T>
FUSEDOPT_INLINE void multiply(const T* __restrict a, const T* __restrict b, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <class T>
FUSEDOPT_INLINE void multiply_by(const T* __restrict a, T b, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b;
}

template <class T>
FUSEDOPT_INLINE void add(const T* __restrict a, const T* __restrict b, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

// As the two above with a rounding to bfloat16 between, in one loop: through memory it would take twice the time.
FUSEDOPT_INLINE void normalize_bfloat16(const float* __restrict x, float rstd, const float* __restrict weight,
                                        float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(to_bfloat16(x[i] * rstd)) * weight[i];
}

template <class T>
T rounded(T value, Storage storage) {
  round_to(storage, &value, 1);
  return value;
}

// 1 / sqrt(mean + eps), in double but where torch would round each operation.
template <class T>
T inverse_root(double sum_of_squares, const RmsNorm& norm) {
  const double mean = sum_of_squares / double(norm.columns);
  if (!norm.rounds_statistics) return T(1 / sqrt(mean + norm.eps));
  const Storage storage = norm.x.storage;
  const T variance = rounded(rounded(T(mean), storage) + T(norm.eps), storage);
  return rounded(T(1 / sqrt(double(variance))), storage);
}

// x, or the sum of x and the residual, which the first of two passes writes and then reads as it was rounded.
template <class T>
class Input {
 public:
  Input(const RmsNorm& norm) : norm_(norm), rows_(norm.residual.data ? norm.total : norm.x) {}

  void go_to(int64_t index) {
    row_ = rows_.row(index);
    if (!norm_.residual.data) return;
    x_ = norm_.x.row(index);
    residual_ = norm_.residual.row(index);
  }
  const T* first(int64_t at, int64_t n) {
    if (norm_.residual.data) {
      T* total = total_block_.place(rows_, row_, at);
      add(x_block_.read(norm_.x, x_, at, n), residual_block_.read(norm_.residual, residual_, at, n), total, n);
      total_block_.write(rows_, row_, at, n);
    }
    return twice_.first(rows_, row_, at, n);
  }
  const T* again(int64_t at, int64_t n) { return twice_.again(rows_, row_, at, n); }

 private:
  const RmsNorm& norm_;
  const Rows& rows_;
  char *row_ = nullptr, *x_ = nullptr, *residual_ = nullptr;
  RowBlock<T> x_block_, residual_block_, total_block_;
  RowTwice<T> twice_;
};

template <class T>
FUSEDOPT_INLINE void normalize(const T* x, T rstd, const T* weight, Storage normalized, T* y, int64_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (normalized == Storage::bfloat16) {
      normalize_bfloat16(x, rstd, weight, y, n);
      return;
    }
  }
  multiply_by(x, rstd, y, n);
  round_to(normalized, y, n);
  for (int64_t i = 0; i < n; ++i) y[i] *= weight[i];
}

template <class T>
void rms_norm_forward(const RmsNorm& norm, int64_t begin, int64_t end) {
  const int64_t columns = norm.columns;
  const T* weight = static_cast<const T*>(norm.weight);
  Input<T> input(norm);
  RowBlock<T> y_block;
  alignas(64) T squares[block_size];
  for (int64_t index = begin; index < end; ++index) {
    input.go_to(index);
    double sum = 0;
    for (int64_t at = 0; at < columns; at += block_size) {
      const int64_t n = columns - at < block_size ? columns - at : block_size;
      const T* x = input.first(at, n);
      if (norm.rounds_statistics) {
        multiply(x, x, squares, n);
        round_to(norm.x.storage, squares, n);
        sum += double(lane_sum<T>(n, [&](auto read) { return read(squares); }));
      } else {
        sum += double(lane_sum<T>(n, [&](auto read) { return read(x) * read(x); }));
      }
    }
    const T rstd = inverse_root<T>(sum, norm);
    if (norm.rstd) static_cast<T*>(norm.rstd)[index] = rstd;
    char* row = norm.y.row(index);
    for (int64_t at = 0; at < columns; at += block_size) {
      const int64_t n = columns - at < block_size ? columns - at : block_size;
      T* y = y_block.place(norm.y, row, at);
      normalize(input.again(at, n), rstd, weight + at, norm.normalized, y, n);
      if (norm.product != norm.y.storage) round_to(norm.product, y, n);
      y_block.write(norm.y, row, at, n);
    }
  }
}

template <class T>
FUSEDOPT_INLINE void input_gradient(const T* __restrict grad, const T* __restrict weight, const T* __restrict x, T rstd,
                                    T mean, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = rstd * (grad[i] * weight[i] - x[i] * rstd * mean);
}

template <class T>
FUSEDOPT_INLINE void add_weight_gradient(const T* __restrict grad, const T* __restrict x, T rstd, T* __restrict sum,
                                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += grad[i] * (x[i] * rstd);
}

// Writes the gradient of x, and adds that of the weight to `weight_sum`, in order of rows, unless it is null.
// Derivatives are those of the formula: where the forward pass rounds makes no difference.
template <class T>
void rms_norm_backward(const RmsNorm& norm, int64_t begin, int64_t end, T* weight_sum) {
  const int64_t columns = norm.columns;
  const T* weight = static_cast<const T*>(norm.weight);
  RowTwice<T> x_twice, grad_twice;
  RowBlock<T> total_block, out_block;
  for (int64_t index = begin; index < end; ++index) {
    char *x_row = norm.x.row(index), *grad_row = norm.grad_y.row(index);
    const T rstd = static_cast<const T*>(norm.rstd)[index];
    double sum = 0;
    for (int64_t at = 0; at < columns; at += block_size) {
      const int64_t n = columns - at < block_size ? columns - at : block_size;
      const T* x = x_twice.first(norm.x, x_row, at, n);
      const T* grad = grad_twice.first(norm.grad_y, grad_row, at, n);
      const T* w = weight + at;
      sum += double(lane_sum<T>(n, [&](auto read) { return read(grad) * read(w) * (read(x) * rstd); }));
    }
    const T mean = T(sum / double(columns));
    char* out_row = norm.grad_x.row(index);
    char* total_row = norm.grad_total.data ? norm.grad_total.row(index) : nullptr;
    for (int64_t at = 0; at < columns; at += block_size) {
      const int64_t n = columns - at < block_size ? columns - at : block_size;
      const T* x = x_twice.again(norm.x, x_row, at, n);
      const T* grad = grad_twice.again(norm.grad_y, grad_row, at, n);
      T* out = out_block.place(norm.grad_x, out_row, at);
      input_gradient(grad, weight + at, x, rstd, mean, out, n);
      if (total_row) {
        const T* more = total_block.read(norm.grad_total, total_row, at, n);
        for (int64_t i = 0; i < n; ++i) out[i] += more[i];
      }
      out_block.write(norm.grad_x, out_row, at, n);
      if (weight_sum) add_weight_gradient(grad, x, rstd, weight_sum + at, n);
    }
  }
}

}  // namespace
}  // namespace fusedopt
