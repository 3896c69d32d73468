// One launch on a GPU: tensors stored alike, and the table that describes them to the kernel, whether that is Triton's
// or CUDA's. kernels/step.py says what a row of the table holds.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "step.h"

namespace fusedopt {

// Elements that one program of a Triton kernel takes at a time: kernels/step.py.
constexpr int64_t tile_size = 8 * int8_block;

// What a launch's tensors share.
struct LaunchForm {
  int group = 0;   // the first parameter group with it, which has its rule
  int device = 0;  // its number
  int rule = 0;    // of registry.h
  int states = 0;
  Storage param, grad, state[max_states], master;
  bool has_master = false, stochastic = false;
  bool captured = false;   // its scalars are computed on the device
  bool zero_grad = false;
  bool aligned = false;    // every address is a multiple of 16 bytes
  int dims = 0;            // of strided tensors, else 0

  int width() const { return 7 + 2 * states + dims * (4 + states); }  // words of a row
  bool serves(const LaunchForm& other) const;  // all but the group is the same
};

struct Launch {
  LaunchForm form;
  std::vector<int64_t> table;    // a row of form.width() words for each tensor; no tensor is empty
  std::vector<double> scalars;   // rows of the rule's scalars with the gradient scale last; empty if captured
  std::vector<int32_t> tiles;    // the tensor of each tile
  std::vector<int> parameters;   // the number of each tensor's parameter in the plan
  bool new_table = true, new_scalars = true, new_tiles = true;  // whether the last step changed them
};

// The launches of a step, from step to step: each keeps its place among all that there were, and its table as it was.
class Launches {
 public:
  void begin();

  // A tensor's row: `words` are those from the third on, but the number of its first tile. `scalars` numbers the
  // distinct rows of scalars, `values`, of the step.
  void add(const LaunchForm& form, int64_t numel, uint64_t key, const std::vector<int64_t>& words, int parameter,
           int scalars, const std::vector<double>& values, double grad_scale);
  void end();

  // Those in use in this step, as places.
  const std::vector<int>& used() const { return used_; }
  const Launch& at(int place) const { return open_[size_t(place)].launch; }

 private:
  struct Open {
    Launch launch;
    std::vector<int64_t> table;
    std::vector<double> scalars;
    std::vector<int> row_of;  // of each distinct row of scalars, or -1
    int64_t tiles = 0;
  };
  std::deque<Open> open_;
  std::vector<int> used_;
};

// Gradients stored alike whose norm is taken; each lies in one piece.
struct NormLaunch {
  int device;
  Storage grad;
  bool aligned;                // every address is a multiple of 16 bytes
  // Rows of 4 words: number of elements, its first tree among those of this launch, address, its first tree among those
  // of all launches, in the order of parameters, which is the order of their sums.
  std::vector<int64_t> table;
  int64_t trees = 0;  // of this launch
};

// The fewest dimensions in which tensors of one shape can be walked in `order`, outermost first: their sizes, then the
// strides of each in elements; none where all lie in one piece. A tensor that is not there has stride 0.
std::vector<int64_t> joint_walk(const std::vector<int64_t>& shape, const std::vector<const int64_t*>& strides,
                                const std::vector<int>& order, bool is_complex, int& dims);

}  // namespace fusedopt
