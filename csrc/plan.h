// An optimizer's step over all its parameters.
//
// A plan fixes the form of every tensor: shape, strides, dtype, the order of keys in the state. Each step walks the
// optimizer's own containers, checks that the form still holds and takes the addresses anew; nothing is remembered by
// object identity and no tensor is kept alive. Where the form changed the step is declined before anything is
// written, and Python, which has the good error messages, makes a new plan.
#pragma once

#include <Python.h>

#include <array>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"
#include "norm.h"
#include "tensor.h"

namespace fusedopt {

constexpr int max_counters = 2;

// What the entries of one parameter group share.
struct GroupSpec {
  int rule;     // of registry.h; of a rule without a CPU kernel, negative
  int scalars;  // the rule's
  bool maximize;
  std::vector<std::string> states;    // the rule's, in order
  std::vector<bool> is_signed;        // of each state: the map of its codes, where it is quantized
  std::vector<std::string> counters;  // zero-dimensional tensors that `scalars` reads and advances, like `step`
  bool has_master;                    // parameters of 16 bits have a master copy, "master" in their state
  bool stochastic;                    // they are rounded stochastically
  uint64_t first_parameter;           // the number of the group's first, for the keys of random numbers
  bool captured;                      // scalars are computed on the device, and it has no counters here
};

// What stochastic rounding draws from, for each group.
using Draws = std::vector<std::pair<uint64_t, uint64_t>>;  // seed, step

// The norm of all these gradients together.
float norm(const std::vector<Squares>& all, int threads);

// Python's exception is set.
struct PythonError {};

class Plan {
 public:
  // `state` is the optimizer's dict parameter -> dict, `groups` its param_groups. The parameters in `params` are stepped
  // whenever they have a gradient, those in `fresh` for the first time; those in `others` never, and for one that is in
  // neither a new plan is needed once it has a gradient. A plan `for_gpu` does not run steps itself but fills the tables
  // of launches.
  Plan(std::vector<GroupSpec> specs, PyObject* state, PyObject* groups, PyObject* params, PyObject* fresh,
       PyObject* others, bool for_gpu);

  // One step. `scalars(group, *counters)` returns the rule's scalars and the advanced counters, and is called once
  // for each distinct combination. Returns a new list of the parameters that were stepped, or a null pointer where the
  // plan no longer fits; nothing has changed then.
  Object step(PyObject* state, PyObject* groups, PyObject* scalars, int threads, double grad_scale,
              const Draws& draws, std::optional<double> max_grad_norm, bool zero_grads);

  // One step on GPUs: `prepare` fills `launches`, and where `clips` also `norm_launches`; false where the plan no longer
  // fits. Once they are queued `finish` counts the step, if it is `done`, and returns the list of parameters.
  bool prepare(PyObject* state, PyObject* groups, PyObject* scalars, double grad_scale, const Draws& draws, bool clips,
               bool zero_grads);
  Object finish(bool done);
  const Launches& launches() const { return launches_; }

  // None where the gradients of several devices, or such as do not lie in one piece, would be needed.
  const std::optional<std::vector<NormLaunch>>& norm_launches() const { return norm_launches_; }

  // Of the last step's gradients, where `max_grad_norm` was given.
  float grad_norm() const { return grad_norm_; }

  // Whether that step left a gradient which was to be zeroed, since it does not lie in one piece.
  bool left_grads() const { return left_grads_; }

 private:
  enum class Kind : uint8_t { ignored, state, scale, master, counter };

  // A zero-dimensional float32 or float64 tensor.
  struct Counter {
    void* data = nullptr;
    bool is_double = false;
    double read() const { return is_double ? *static_cast<double*>(data) : *static_cast<float*>(data); }
    void write(double value) const {
      is_double ? *static_cast<double*>(data) = value : *static_cast<float*>(data) = float(value);
    }
  };

  // The keys of a parameter's state dict, in its order: what each is, and which of its kind.
  struct Keys {
    std::vector<std::pair<Kind, int>> kinds;
    std::vector<Object> names;
  };

  struct Entry {
    PyObject* param;  // borrowed from the group's list, which is compared before it is used
    int group;
    int scalars = 0;            // index into scalars_
    bool other = false;         // another plan steps it
    bool distributed;           // a DTensor: its local shard is stepped
    bool planned = false;       // is in `params`, and has its state
    bool active = false;        // takes part in this step
    bool fresh = false;
    bool is_double = false;
    bool in_place = true;       // the gradient's memory is what is read, in one piece
    bool is_ordered = false;    // elements are walked in row-major order
    uint64_t number;            // of the parameter, for the keys of random numbers
    Update update;
    Squares squares;
    const Form *param_form, *grad_form, *state_form[max_states], *scale_form[max_states], *master_form = nullptr;
    const Keys* keys = nullptr;
    // Of a plan for GPUs.
    LaunchForm form;
    std::vector<int64_t> walk;
    Counter counters[max_counters];
    // Ranges of hints_: what refresh_tensors and refresh_state will touch.
    uint32_t tensor_hints = 0, state_hints = 0, end_hints = 0;
  };

  struct Scalars {
    int group;
    std::vector<double> counters, values, advanced;
  };

  bool plan_entry(Entry& entry, PyObject* state);
  void plan_grad(Entry& entry, PyObject* stored, const std::vector<int>& order);
  bool replan_grad(Entry& entry, PyObject* stored, const View& view);
  bool plan_state(Entry& entry, PyObject* dict, const std::vector<int>& order, bool has_master);
  std::pair<Kind, int> kind_of(PyObject* key, const GroupSpec& spec, bool has_master) const;
  bool is_ordered(const Entry& entry, PyObject* dict) const;
  void plan_launch(Entry& entry, const std::vector<int>& order);
  const Form* plan_form(PyObject* tensor, const std::vector<int>& order, Operand& operand);
  bool refresh(PyObject* state, PyObject* groups);
  bool refresh_state(Entry& entry, PyObject* dict);
  bool refresh_tensors(Entry& entry);
  void hint(const void* address, int lines);
  void hint_tensor(PyObject* tensor);
  bool begin(PyObject* state, PyObject* groups, PyObject* scalars);
  void end();
  void find_scalars(Entry& entry);
  void compute_scalars(PyObject* function);
  void run(int threads, double grad_scale, const Draws& draws, bool zero_grads);
  void fill_launches(double grad_scale, const Draws& draws, bool zero_grads);
  void fill_norm_launches();
  void count();
  Object stepped() const;
  PyObject* local(const Entry& entry, PyObject* tensor);
  PyObject* resolved(PyObject* grad);
  PyObject* keep(PyObject* owned);

  const bool for_gpu_;
  bool running_ = false, left_grads_ = false;
  float grad_norm_ = 0;
  std::vector<GroupSpec> specs_;
  std::vector<Py_ssize_t> group_sizes_;
  std::vector<Entry> entries_;         // in the order of the groups
  // Most tensors of a model share few forms; apart, they would not stay in the cache.
  std::deque<Form> forms_;
  std::deque<Keys> keys_;
  // Cache lines to fetch ahead: a model's tensor objects are cold after its backward pass, and reading forty lines of
  // each in turn costs more than the update of a small tensor. Only hints: never followed, harmless when out of date.
  std::vector<const void*> hints_;
  std::vector<int> state_order_;       // entry of each key of the optimizer's state, or -1
  std::vector<Scalars> scalars_;       // of this step
  // Which of them a group and the bits of its counters have.
  using ScalarsKey = std::array<uint64_t, 1 + max_counters>;
  std::map<ScalarsKey, int> scalars_of_;
  Launches launches_;
  std::optional<std::vector<NormLaunch>> norm_launches_;
  std::vector<Object> kept_;           // during a step: gradients, and tensors that another thread might drop
};

}  // namespace fusedopt
