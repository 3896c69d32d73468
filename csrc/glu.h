// Gated linear units: an activation of one tensor times another, element by element, forward and backward.
// The reference is fusedopt/_glu.py.
#pragma once

#include "elementary.h"
#include "rows.h"

namespace fusedopt {

// In the order of fusedopt/_glu.py's KINDS.
#define FUSEDOPT_ACTIVATIONS(X) X(Silu) X(Gelu) X(GeluTanh) X(Relu) X(Relu2) X(ClampedSilu)

struct Glu {
  int64_t columns = 0;
  Rows gate, up, y, grad_y, grad_gate, grad_up;  // without `up` it counts as 1
  double limit = 0;                              // of ClampedSilu
};

namespace {

// What an activation makes of a gate: its value, and its derivative there.
template <class Value>
struct Activated {
  Value value, slope;
};

struct Silu {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value>) {
    const auto s = sigmoid(x);
    return {x * s.value, s.value * (Lane<Value>(1) + s.argument * s.rest)};
  }
};

struct Gelu {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value>) {
    using T = Lane<Value>;
    const Value cdf = T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));
    const Value density = T(0.39894228040143267794) * exp_of_negative(T(-0.5) * x * x);
    return {x * cdf, cdf + x * density};
  }
};

// 0.5 (1 + tanh(u)) is the logistic function of 2 u, which loses nothing where tanh is near -1.
struct GeluTanh {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value>) {
    using T = Lane<Value>;
    const T scale = T(1.5957691216057307117), cubic = T(0.044715);
    const auto s = sigmoid(scale * (x + cubic * x * x * x));
    // Beyond, the slope is 0 or 1 in any sum.
    const Value near = clamp(x, T(-20), T(20));
    return {x * s.value, s.value * (T(1) + near * s.rest * (scale * (T(1) + T(3) * cubic * near * near)))};
  }
};

struct Relu {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value>) {
    using T = Lane<Value>;
    return {where(x <= T(0), T(0), x), Value(where(x <= T(0), T(0), T(1)))};
  }
};

struct Relu2 {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value>) {
    using T = Lane<Value>;
    const Value positive = where(x <= T(0), T(0), x);
    return {positive * positive, T(2) * positive};
  }
};

// gpt-oss: min(x, limit) * sigmoid(1.702 min(x, limit)); its other half is clamped too, and has 1 added.
struct ClampedSilu {
  template <class Value>
  FUSEDOPT_INLINE static Activated<Value> apply(const Value& x, Lane<Value> limit) {
    using T = Lane<Value>;
    const Value clamped = at_most(limit, x);
    const auto s = sigmoid(T(1.702) * clamped);
    return {clamped * s.value, where(x <= limit, s.value * (T(1) + s.argument * s.rest), T(0))};
  }
};

template <class Activation, class Value>
FUSEDOPT_INLINE Activated<Value> factor(const Value& up, Lane<Value> limit) {
  using T = Lane<Value>;
  if constexpr (std::is_same_v<Activation, ClampedSilu>)
    return {clamp(up, -limit, limit) + T(1), where((up >= -limit) & (up <= limit), T(1), T(0))};
  else
    return {up, Value{} + T(1)};
}

// What is computed at a time. Of float64 one: its functions are the mathematics library's.
template <class T>
using Values = std::conditional_t<std::is_same_v<T, float>, Lanes, T>;

template <class Activation, class T>
FUSEDOPT_INLINE void activate(const T* __restrict gate, const T* __restrict up, T limit, T* __restrict y, int64_t n) {
  using Value = Values<T>;
  for_each_value<Value>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Value a = Activation::apply(load<Value>(gate + i, count), limit).value;
    store(a * factor<Activation>(load<Value>(up + i, count), limit).value, y + i, count);
  });
}

template <class Activation, class T>
FUSEDOPT_INLINE void differentiate(const T* __restrict grad, const T* __restrict gate, const T* __restrict up, T limit,
                                   T* __restrict grad_gate, T* __restrict grad_up, int64_t n) {
  using Value = Values<T>;
  for_each_value<Value>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const auto a = Activation::apply(load<Value>(gate + i, count), limit);
    const auto b = factor<Activation>(load<Value>(up + i, count), limit);
    const Value g = load<Value>(grad + i, count);
    store(g * b.value * a.slope, grad_gate + i, count);
    store(g * a.value * b.slope, grad_up + i, count);
  });
}

// Blocks [begin, end) of all rows, each row being cut into blocks of block_size.
template <class Walk>
FUSEDOPT_INLINE void for_each_block(int64_t columns, int64_t begin, int64_t end, Walk walk) {
  const int64_t blocks = (columns + block_size - 1) / block_size;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block % blocks * block_size;
    walk(block / blocks, at, columns - at < block_size ? columns - at : block_size);
  }
}

template <class T>
struct Ones {
  T values[block_size];
  Ones() {
    for (T& value : values) value = T(1);
  }
};

template <class Activation, class T>
void glu_forward(const Glu& glu, int64_t begin, int64_t end) {
  const Ones<T> ones;
  RowBlock<T> gate, up, y;
  for_each_block(glu.columns, begin, end, [&](int64_t row, int64_t at, int64_t n) {
    const T* g = gate.read(glu.gate, glu.gate.row(row), at, n);
    const T* u = glu.up.data ? up.read(glu.up, glu.up.row(row), at, n) : ones.values;
    char* y_row = glu.y.row(row);
    activate<Activation>(g, u, T(glu.limit), y.place(glu.y, y_row, at), n);
    y.write(glu.y, y_row, at, n);
  });
}

template <class Activation, class T>
void glu_backward(const Glu& glu, int64_t begin, int64_t end) {
  const Ones<T> ones;
  RowBlock<T> grad, gate, up, grad_gate, grad_up;
  alignas(64) T unused[block_size];
  for_each_block(glu.columns, begin, end, [&](int64_t row, int64_t at, int64_t n) {
    const T* dy = grad.read(glu.grad_y, glu.grad_y.row(row), at, n);
    const T* g = gate.read(glu.gate, glu.gate.row(row), at, n);
    const T* u = glu.up.data ? up.read(glu.up, glu.up.row(row), at, n) : ones.values;
    char* gate_row = glu.grad_gate.row(row);
    char* up_row = glu.up.data ? glu.grad_up.row(row) : nullptr;
    T* dgate = grad_gate.place(glu.grad_gate, gate_row, at);
    T* dup = up_row ? grad_up.place(glu.grad_up, up_row, at) : unused;
    differentiate<Activation>(dy, g, u, T(glu.limit), dgate, dup, n);
    grad_gate.write(glu.grad_gate, gate_row, at, n);
    if (up_row) grad_up.write(glu.grad_up, up_row, at, n);
  });
}

}  // namespace
}  // namespace fusedopt
