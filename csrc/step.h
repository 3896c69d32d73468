// One parameter's update: the loop over <Rule, arithmetic type>, for any mix of storage.
#pragma once

#include <cstdint>
#include <cstring>

#include "codecs.h"
#include "rules.h"

namespace fusedopt {

constexpr int max_states = 4, max_scalars = 12, max_dims = 64;

// Elements read into the arithmetic type at a time: small enough for every operand of a rule to stay in L1.
constexpr int64_t block_size = 512;

// Sizes and strides of a tensor that is not contiguous in the order its parameter is walked, in elements.
struct Layout {
  int dims = 0;
  int64_t size[max_dims + 1];  // one more for the parts of a complex number
  int64_t stride[max_dims + 1];
};

struct Operand {
  char* data = nullptr;
  Storage storage = Storage::float32;
  const Layout* layout = nullptr;  // none where element i lies at i
};

struct Update {
  int64_t numel = 0;
  Operand param, grad, state[max_states];
  double grad_scale = 1;            // the gradient is multiplied by this as it is read
  const double* scalar = nullptr;  // rounded once to the arithmetic type
};

// Updates elements [begin, end) of one parameter.
using UpdateRange = void (*)(const Update&, int64_t begin, int64_t end);

// The kernels of one instruction set, in the order of FUSEDOPT_RULES.
struct Kernels {
  const char* name;
  const UpdateRange* in_float32;
  const UpdateRange* in_float64;
};

namespace {

// Copies `n` elements from position `start` of a strided tensor, in its walking order, to or from packed memory.
template <bool pack>
FUSEDOPT_NOINLINE void copy_strided(char* data, const Layout& layout, int width, int64_t start, int64_t n, char* packed) {
  int64_t index[max_dims + 1], offset = 0, rest = start;
  for (int d = layout.dims - 1; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
    offset += index[d] * layout.stride[d];
  }
  const int last = layout.dims - 1;
  while (n > 0) {
    const int64_t row = layout.size[last] - index[last], count = row < n ? row : n;
    const int64_t stride = layout.stride[last];
    for (int64_t i = 0; i < count; ++i) {
      char* element = data + (offset + i * stride) * width;
      pack ? std::memcpy(packed, element, size_t(width)) : std::memcpy(element, packed, size_t(width));
      packed += width;
    }
    n -= count;
    index[last] += count;
    offset += count * stride;
    for (int d = last; d > 0 && index[d] == layout.size[d]; --d) {
      offset += layout.stride[d - 1] - index[d] * layout.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class T>
constexpr Storage native_storage = sizeof(T) == 4 ? Storage::float32 : Storage::float64;

// One operand's block in the arithmetic type: the tensor's own memory where that is its format, else a copy.
template <class T>
class Block {
 public:
  T* read(const Operand& operand, int64_t start, int64_t n, bool copy = false) {
    const int width = element_size(operand.storage);
    const bool direct = operand.storage == native_storage<T>;
    if (!operand.layout) {
      char* data = operand.data + start * width;
      if (direct && !copy) return reinterpret_cast<T*>(data);
      decode(operand.storage, data, values_, n);
    } else {
      copy_strided<true>(operand.data, *operand.layout, width, start, n, packed_);
      decode(operand.storage, packed_, values_, n);
    }
    return values_;
  }

  void write(const Operand& operand, int64_t start, int64_t n) {
    const int width = element_size(operand.storage);
    if (!operand.layout) {
      if (operand.storage == native_storage<T>) return;
      encode(operand.storage, values_, operand.data + start * width, n);
    } else {
      encode(operand.storage, values_, packed_, n);
      copy_strided<false>(operand.data, *operand.layout, width, start, n, packed_);
    }
  }

 private:
  alignas(64) T values_[block_size];
  alignas(64) char packed_[block_size * sizeof(double)];
};

// The rule over one block. Restricted pointers and no calls: the compiler vectorises this for the instruction set.
template <class Rule, class T>
void apply(T* __restrict p, const T* __restrict g, T* const* states, const T* scalar, int64_t n) {
  constexpr int count = Rule::states;
  T* __restrict s0 = count > 0 ? states[0] : nullptr;
  T* __restrict s1 = count > 1 ? states[1] : nullptr;
  T* __restrict s2 = count > 2 ? states[2] : nullptr;
  T* __restrict s3 = count > 3 ? states[3] : nullptr;
  T scalars[Rule::scalars];
  for (int k = 0; k < Rule::scalars; ++k) scalars[k] = scalar[k];
  for (int64_t i = 0; i < n; ++i) {
    T value = p[i], state[max_states];
    if constexpr (count > 0) state[0] = s0[i];
    if constexpr (count > 1) state[1] = s1[i];
    if constexpr (count > 2) state[2] = s2[i];
    if constexpr (count > 3) state[3] = s3[i];
    Rule::template apply<T>(value, g[i], state, scalars);
    p[i] = value;
    if constexpr (count > 0) s0[i] = state[0];
    if constexpr (count > 1) s1[i] = state[1];
    if constexpr (count > 2) s2[i] = state[2];
    if constexpr (count > 3) s3[i] = state[3];
  }
}

template <class Rule, class T>
void update_range(const Update& update, int64_t begin, int64_t end) {
  static_assert(Rule::states <= max_states && Rule::scalars <= max_scalars, "raise the limit");
  Block<T> param, grad, state[Rule::states + 1];
  T scalar[Rule::scalars];
  for (int k = 0; k < Rule::scalars; ++k) scalar[k] = T(update.scalar[k]);
  const T grad_scale = T(update.grad_scale);
  const bool scaled = grad_scale != T(1);
  for (int64_t at = begin; at < end; at += block_size) {
    const int64_t n = end - at < block_size ? end - at : block_size;
    T* p = param.read(update.param, at, n);
    T* g = grad.read(update.grad, at, n, scaled);
    if (scaled)
      for (int64_t i = 0; i < n; ++i) g[i] *= grad_scale;
    T* states[Rule::states + 1];
    for (int k = 0; k < Rule::states; ++k) states[k] = state[k].read(update.state[k], at, n);
    apply<Rule, T>(p, g, states, scalar, n);
    param.write(update.param, at, n);
    for (int k = 0; k < Rule::states; ++k) state[k].write(update.state[k], at, n);
  }
}

}  // namespace
}  // namespace fusedopt
