// What the CUDA kernels are given, by value: the table too where it fits, so that a launch takes no copy of its own.
#pragma once

#include <cstdint>

#include "../codecs.h"

namespace fusedopt {

// The most states of a rule, and the elements that one block of threads takes: as step.h and launch.h have them.
constexpr int cuda_states = 4;
constexpr int64_t cuda_tile = 2048;
constexpr int cuda_threads = 128;

// The largest argument of a kernel since CUDA 12.1.
constexpr int cuda_argument_bytes = 32764;

// What a rule works on, in the order of a row's addresses and strides.
enum { param_operand, grad_operand, master_operand, first_state };

struct StepHead {
  uint64_t control;         // address of two float64: a factor of the gradient, and whether to skip the step
  uint64_t table, scalars;  // addresses; 0 where they lie in `words`
  int32_t rows, width;      // of the table, whose rows kernels/step.py describes
  int32_t dims;
  int32_t scalar_words;  // where the scalars begin in `words`
  Storage storage[first_state + cuda_states];
  uint8_t element_size[first_state + cuda_states];
  bool has_master, stochastic, zero_grad, aligned;
};

constexpr int step_words = (cuda_argument_bytes - int(sizeof(StepHead))) / 8;

struct StepArguments {
  StepHead head;
  int64_t words[step_words];
};

struct NormHead {
  uint64_t control, table, sums;  // addresses; table 0 where it lies in `words`
  int64_t trees;
  int32_t rows;
  Storage grad;
  bool aligned;
};

constexpr int norm_words = (cuda_argument_bytes - int(sizeof(NormHead))) / 8;

// Numbers that one tree sums, as in norm.h.
constexpr int tree_words = 1024;

// Rows of the table: elements, first tree of this launch, address, first tree of all launches.
constexpr int norm_width = 4;

struct NormArguments {
  NormHead head;
  int64_t words[norm_words];
};

// Sums of `trees` sums; where one is left, the norm and the factor of the gradient.
struct SumArguments {
  uint64_t sums, next;  // addresses of float32; next 0 where one tree is left
  int64_t count;
  uint64_t control_in, control_out, norm;
  double max_norm;
};

static_assert(sizeof(StepArguments) <= cuda_argument_bytes, "too large");
static_assert(sizeof(NormArguments) <= cuda_argument_bytes, "too large");

}  // namespace fusedopt
