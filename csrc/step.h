// One parameter's update: the loop over <Rule, arithmetic type>, for any mix of storage.
#pragma once

#include <cstdint>
#include <cstring>

#include "codecs.h"
#include "parameter.h"
#include "rules.h"

namespace fusedopt {

constexpr int max_states = 4, max_scalars = 12, max_dims = 64;

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
  float* scale = nullptr;          // of a quantized state, one for each int8_block elements
};

struct Update {
  int64_t numel = 0;
  Operand param, grad, state[max_states];
  Operand master;       // beside a parameter of 16 bits: float32, low16 or low8; none where its data is null
  bool stochastic = false;  // rounding of a parameter of 16 bits, or of the 24 that low8 makes
  Key key = {};
  double grad_scale = 1;           // the gradient is multiplied by this as it is read
  bool zero_grad = false;          // and set to zero then; only where it lies in one piece
  const double* scalar = nullptr;  // rounded once to the arithmetic type
};

// Updates elements [begin, end) of one parameter; `begin` is a multiple of block_size, and so is `end` unless it is the
// last.
using UpdateRange = void (*)(const Update&, int64_t begin, int64_t end);

struct Squares;

// Writes the sums of trees [begin, end), of norm.h.
using SquareSums = void (*)(const Squares&, int64_t begin, int64_t end, float* sums);

// Those of rms_norm.h, over rows, and of glu.h, over blocks of rows.
struct RmsNorm;
struct Glu;
template <class T>
struct RowKernels {
  void (*rms_norm_forward)(const RmsNorm&, int64_t begin, int64_t end);
  void (*rms_norm_backward)(const RmsNorm&, int64_t begin, int64_t end, T* weight_sum);
  void (*const* glu_forward)(const Glu&, int64_t begin, int64_t end);  // in the order of FUSEDOPT_ACTIVATIONS
  void (*const* glu_backward)(const Glu&, int64_t begin, int64_t end);
};

// That of matmul.h: computes one tile of a product.
struct Matmul;
struct MatmulTile;
using MatmulKernel = void (*)(const Matmul&, int64_t batch, const MatmulTile&, float* workspace);

// The kernels of one instruction set, in the order of FUSEDOPT_RULES.
struct Kernels {
  const char* name;
  const UpdateRange* in_float32;
  const UpdateRange* in_float64;
  SquareSums square_sums;
  RowKernels<float> rows_in_float32;
  RowKernels<double> rows_in_float64;
  MatmulKernel matmul;
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
    if (!operand.layout && operand.storage == native_storage<T> && !copy)
      return reinterpret_cast<T*>(operand.data + start * int64_t(sizeof(T)));
    decode(operand.storage, fetch(operand, start, n), scale(operand, start), values_, n);
    return values_;
  }

  void write(const Operand& operand, int64_t start, int64_t n) {
    if (!operand.layout && operand.storage == native_storage<T>) return;
    write_values(values_, operand, start, n);
  }

  void write_values(const T* values, const Operand& operand, int64_t start, int64_t n) {
    encode(operand.storage, values, place(operand, start), scale(operand, start), n);
    put(operand, start, n);
  }

  // The block as it is stored: in the tensor where that lies in one piece, else a packed copy.
  const char* fetch(const Operand& operand, int64_t start, int64_t n) {
    const int width = element_size(operand.storage);
    if (!operand.layout) return operand.data + start * width;
    copy_strided<true>(operand.data, *operand.layout, width, start, n, packed_);
    return packed_;
  }

  // Where the block is to be written as it is stored; `put` then brings it into the tensor.
  char* place(const Operand& operand, int64_t start) {
    return operand.layout ? packed_ : operand.data + start * element_size(operand.storage);
  }
  void put(const Operand& operand, int64_t start, int64_t n) {
    if (operand.layout)
      copy_strided<false>(operand.data, *operand.layout, element_size(operand.storage), start, n, packed_);
  }

 private:
  static float* scale(const Operand& operand, int64_t start) {
    return operand.scale ? operand.scale + start / int8_block : nullptr;
  }

  alignas(64) T values_[block_size];
  alignas(64) char packed_[block_size * sizeof(double)];
};

// A parameter of 16 bits, with what it keeps beside them.
class Parameter {
 public:
  FUSEDOPT_NOINLINE float* read(const Update& update, int64_t start, int64_t n) {
    float* values = param_.read(update.param, start, n);
    if (!update.master.data) return values;
    if (update.master.storage == Storage::float32) {
      float* master = master_.read(update.master, start, n);
      keep_current(update.param.storage, values, master, n);
      return master;
    }
    join(update.master.storage, master_.fetch(update.master, start, n), values, n);
    return values;
  }

  FUSEDOPT_NOINLINE void write(const float* values, const Update& update, int64_t start, int64_t n) {
    const Key* key = update.stochastic ? &update.key : nullptr;
    char* param = param_.place(update.param, start);
    if (update.master.data && update.master.storage != Storage::float32) {
      split(update.master.storage, values, reinterpret_cast<uint16_t*>(param), master_.place(update.master, start), n,
            start, key);
      master_.put(update.master, start, n);
    } else if (key) {
      encode_stochastic(update.param.storage, values, reinterpret_cast<uint16_t*>(param), n, start, *key);
    } else {
      encode(update.param.storage, values, param, nullptr, n);
      if (update.master.data) master_.write(update.master, start, n);
    }
    param_.put(update.param, start, n);
  }

 private:
  Block<float> param_, master_;
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
  Parameter narrow;
  // Nothing of the kind is kept beside a parameter of 32 or 64 bits.
  const bool is_narrow = sizeof(T) == sizeof(float) && (update.master.data || update.stochastic);
  T scalar[Rule::scalars];
  for (int k = 0; k < Rule::scalars; ++k) scalar[k] = T(update.scalar[k]);
  const T grad_scale = T(update.grad_scale);
  const bool scaled = grad_scale != T(1);
  for (int64_t at = begin; at < end; at += block_size) {
    const int64_t n = end - at < block_size ? end - at : block_size;
    T* p;
    if constexpr (sizeof(T) == sizeof(float))
      p = is_narrow ? narrow.read(update, at, n) : param.read(update.param, at, n);
    else
      p = param.read(update.param, at, n);
    T* g = grad.read(update.grad, at, n, scaled);
    if (scaled)
      for (int64_t i = 0; i < n; ++i) g[i] *= grad_scale;
    T* states[Rule::states + 1];
    for (int k = 0; k < Rule::states; ++k) states[k] = state[k].read(update.state[k], at, n);
    apply<Rule, T>(p, g, states, scalar, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_narrow)
        narrow.write(p, update, at, n);
      else
        param.write(update.param, at, n);
    } else {
      param.write(update.param, at, n);
    }
    for (int k = 0; k < Rule::states; ++k) state[k].write(update.state[k], at, n);
    if (update.zero_grad) {
      const int width = element_size(update.grad.storage);
      std::memset(update.grad.data + at * width, 0, size_t(n * width));
    }
  }
}

}  // namespace
}  // namespace fusedopt
