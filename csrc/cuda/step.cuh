// One launch for many tensors: a rule over their elements, whatever they are stored as.
//
// Storage is chosen at run time and uniform over the launch, so that a rule has one kernel for each arithmetic type. A
// block of threads takes a tile of one tensor, and each of its warps a part of that, then another.
#pragma once

#include "../rules.h"
#include "codecs.cuh"

namespace fusedopt {
namespace {

__device__ __forceinline__ bool is_int8(Storage storage) {
  return storage == Storage::int8_signed || storage == Storage::int8_unsigned;
}

// The last row whose word `first` is not above `number`.
__device__ __forceinline__ const int64_t* find_row(const int64_t* table, int rows, int width, int first,
                                                   int64_t number) {
  int low = 0, high = rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table[int64_t(middle) * width + first] <= number)
      low = middle;
    else
      high = middle;
  }
  return table + int64_t(low) * width;
}

template <class Rule, class T>
class Step {
  static constexpr int states = Rule::states, operands = first_state + states, scalar_count = Rule::scalars;
  static_assert(states <= cuda_states, "raise the limit");

  // Beside float64 parameters there is no master copy.
  static constexpr int part_bytes = span * int(sizeof(T)), buffers = operands - (sizeof(T) == 8);

 public:
  struct Shared {
    alignas(16) char buffer[cuda_threads / lanes][buffers * part_bytes];
    Int8Tables tables;
  };

  __device__ __forceinline__ Step(const StepArguments& arguments, Shared& shared, const int64_t* row, int64_t begin)
      : arguments_(arguments), head_(arguments.head), shared_(shared), row_(row), lane_(int(threadIdx.x) % lanes) {
    const int64_t numel = row[0];
    part_ = {begin, numel, fits() && begin + span <= numel, head_.dims, walk(0), lane_};
  }

  __device__ __forceinline__ void run(double factor, bool fill_tables) {
    read();
    if (part_.begin < part_.numel) read_scalars(factor);
    if (fill_tables && quantized()) {
      fill(shared_.tables, int(threadIdx.x), cuda_threads);
      __syncthreads();
    }
    if (part_.begin >= part_.numel) return;
    __pipeline_wait_prior(0);
    __syncwarp();
    decode();
    __syncwarp();
    apply();
    encode();
    __syncwarp();
    write();
    __syncwarp();
  }

 private:
  __device__ __forceinline__ const int64_t* walk(int number) const {
    return row_ + 7 + 2 * states + number * head_.dims;
  }
  __device__ __forceinline__ bool there(int k) const {
    return k != master_operand || (sizeof(T) == 4 && head_.has_master);
  }
  __device__ __forceinline__ bool written(int k) const { return there(k) && (k != grad_operand || head_.zero_grad); }
  __device__ __forceinline__ Stored operand(int k) const {
    const int word = k < first_state ? 4 + k : 1 + 2 * k;
    return {reinterpret_cast<char*>(row_[word]), head_.element_size[k], walk(1 + k)};
  }
  __device__ __forceinline__ char* buffer(int k) const {
    const int number = sizeof(T) == 8 && k > master_operand ? k - 1 : k;
    return shared_.buffer[int(threadIdx.x) / lanes] + number * part_bytes;
  }
  __device__ __forceinline__ float* scale(int state) const {
    return global<float>(uint64_t(row_[8 + 2 * state])) + part_.begin / int8_block;
  }
  // Into float32 arithmetic float64 is read element by element.
  __device__ __forceinline__ bool fits() const {
    bool fits = head_.aligned;
#pragma unroll
    for (int k = 0; k < operands; ++k) fits = fits && (!there(k) || head_.element_size[k] <= sizeof(T));
    return fits;
  }
  __device__ __forceinline__ bool quantized() const {
    bool quantized = false;
#pragma unroll
    for (int k = first_state; k < operands; ++k) quantized = quantized || is_int8(head_.storage[k]);
    return quantized;
  }

  __device__ __forceinline__ void read() {
    if (part_.whole) {
      // All copies are under way before anything waits for one.
#pragma unroll
      for (int k = 0; k < operands; ++k)
        if (there(k)) copy_in<T>(part_, operand(k), buffer(k));
      __pipeline_commit();
    } else {
      // Not unrolled: it would be most of the code.
#pragma unroll 1
      for (int k = 0; k < operands; ++k)
        if (there(k)) copy_elements_in<T>(part_, operand(k), buffer(k));
    }
  }

  __device__ __forceinline__ void write() {
    if (part_.whole) {
#pragma unroll
      for (int k = 0; k < operands; ++k)
        if (written(k)) copy_out<T>(part_, operand(k), buffer(k));
    } else {
#pragma unroll 1
      for (int k = 0; k < operands; ++k)
        if (written(k)) copy_elements_out<T>(part_, operand(k), buffer(k));
    }
  }

  __device__ __forceinline__ void read_scalars(double factor) {
    const double* scalars = head_.scalars ? global<const double>(head_.scalars)
                                          : reinterpret_cast<const double*>(arguments_.words + head_.scalar_words);
    scalars += row_[1] * (scalar_count + 1);
#pragma unroll
    for (int k = 0; k < scalar_count; ++k) scalar_[k] = T(scalars[k]);
    grad_scale_ = T(scalars[scalar_count] * factor);
#pragma unroll
    for (int k = 0; k < states; ++k)
      if (is_int8(head_.storage[first_state + k])) scale_[k] = *scale(k);
  }

  __device__ __forceinline__ void decode() {
    decode_float(head_.storage[param_operand], buffer(param_operand), lane_, param_);
    if constexpr (sizeof(T) == 4)
      if (head_.has_master)
        decode_master(head_.storage[param_operand], head_.storage[master_operand], buffer(master_operand), lane_,
                      param_);
    decode_float(head_.storage[grad_operand], buffer(grad_operand), lane_, grad_);
#pragma unroll
    for (int j = 0; j < share; ++j) grad_[j] *= grad_scale_;
#pragma unroll
    for (int k = 0; k < states; ++k) {
      const Storage storage = head_.storage[first_state + k];
      if (is_int8(storage))
        decode_int8(shared_.tables.maps[storage == Storage::int8_unsigned], scale_[k], buffer(first_state + k), lane_,
                    state_[k]);
      else
        decode_float(storage, buffer(first_state + k), lane_, state_[k]);
    }
  }

  __device__ __forceinline__ void apply() {
#pragma unroll
    for (int j = 0; j < share; ++j) {
      T values[states + 1];
#pragma unroll
      for (int k = 0; k < states; ++k) values[k] = state_[k][j];
      Rule::template apply<T>(param_[j], grad_[j], values, scalar_);
#pragma unroll
      for (int k = 0; k < states; ++k) state_[k][j] = values[k];
    }
  }

  __device__ __forceinline__ void encode() {
    encode_parameter();
#pragma unroll
    for (int k = 0; k < states; ++k) {
      const Storage storage = head_.storage[first_state + k];
      if (is_int8(storage))
        encode_state(k, storage == Storage::int8_signed);
      else
        encode_float(storage, state_[k], buffer(first_state + k), lane_);
    }
    if (head_.zero_grad)
#pragma unroll
      for (int at = 0; at < part_bytes; at += 16 * lanes)
        *reinterpret_cast<uint4*>(buffer(grad_operand) + at + 16 * lane_) = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void encode_parameter() {
    const Storage storage = head_.storage[param_operand];
    char* to = buffer(param_operand);
    if constexpr (sizeof(T) == 4) {
      const Storage master = head_.storage[master_operand];
      const auto key = uint64_t(row_[2]);
      const RandomWords random({uint32_t(key), uint32_t(key >> 32)}, part_.begin);
      if (head_.has_master && master != Storage::float32) {
        encode_split(master, head_.stochastic, random, param_, to, buffer(master_operand), lane_);
        return;
      }
      if (head_.has_master) encode_float(Storage::float32, param_, buffer(master_operand), lane_);
      if (head_.stochastic) {
        encode_stochastic(storage, random, param_, to, lane_);
        return;
      }
    }
    encode_float(storage, param_, to, lane_);
  }

  __device__ __forceinline__ void encode_state(int k, bool is_signed) {
    // What lies beyond the tensor is no part of its last block.
    if (!part_.whole)
#pragma unroll
      for (int j = 0; j < share; ++j)
        if (part_.begin + position<T>(lane_, j) >= part_.numel) state_[k][j] = 0;
    const float found =
        encode_int8(shared_.tables.maps[!is_signed], is_signed, state_[k], buffer(first_state + k), lane_);
    if (lane_ == 0) *scale(k) = found;
  }

  const StepArguments& arguments_;
  const StepHead& head_;
  Shared& shared_;
  const int64_t* const row_;
  const int lane_;
  Part part_;
  float scale_[states + 1];
  T grad_scale_, scalar_[scalar_count];
  T param_[share], grad_[share], state_[states + 1][share];
};

template <class Rule, class T>
__device__ __forceinline__ void step(const StepArguments& arguments, typename Step<Rule, T>::Shared& shared) {
  const StepHead& head = arguments.head;
  const double* control = global<const double>(head.control);
  if (control[1] != 0) return;
  const int64_t* table = head.table ? global<const int64_t>(head.table) : arguments.words;
  const int64_t* row = find_row(table, head.rows, head.width, 3, blockIdx.x);
  const int64_t start = (int64_t(blockIdx.x) - row[3]) * cuda_tile;
#pragma unroll 1
  for (int at = 0; at < int(cuda_tile); at += cuda_threads / lanes * span)
    Step<Rule, T>(arguments, shared, row, start + at + int(threadIdx.x) / lanes * span).run(control[0], at == 0);
}

}  // namespace
}  // namespace fusedopt
