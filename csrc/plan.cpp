#include "plan.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "cpu/threads.h"
#include "registry.h"

namespace fusedopt {
namespace {

struct Interned {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* local = PyUnicode_InternFromString("_local_tensor");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* resolve_neg = PyUnicode_InternFromString("resolve_neg");
  PyObject* is_conj = PyUnicode_InternFromString("is_conj");
  PyObject* resolve_conj = PyUnicode_InternFromString("resolve_conj");
  PyObject* is_zerotensor = PyUnicode_InternFromString("_is_zerotensor");
  PyObject* clone = PyUnicode_InternFromString("clone");
  PyObject* cdata = PyUnicode_InternFromString("_cdata");
  PyObject* untyped_storage = PyUnicode_InternFromString("untyped_storage");
};
const Interned& interned() {
  static const Interned instance;
  return instance;
}

// Parameters between the one that is read and the one whose memory is fetched ahead.
constexpr size_t hint_distance = 4;
constexpr int cache_line = 64;

void fetch_ahead(const void* const* begin, const void* const* end) {
  for (; begin != end; ++begin) __builtin_prefetch(*begin);
}

// More shares than threads, so that a thread which other work delays leaves its rest to the others.
constexpr int shares_per_thread = 4;

// Elements below which waking other threads costs more than it saves.
constexpr int64_t elements_per_thread = 16384;

constexpr const char* scale_suffix = "_scale";

// `elements` rounded up.
int64_t whole_blocks(int64_t elements) { return (elements + block_size - 1) / block_size * block_size; }

bool same_name(PyObject* a, PyObject* b) { return a == b || PyUnicode_Compare(a, b) == 0; }

struct Described : View {
  explicit Described(PyObject* tensor) {
    if (!describe(tensor, *this)) throw PythonError{};
  }
};

// Whether `tensor` can be described: one that became sparse is no longer as planned.
bool describable(PyObject* tensor, View& view) {
  const bool described = describe(tensor, view);
  if (!described) PyErr_Clear();
  return described;
}

// And read: one that moved to a device without memory, or whose storage was freed, is not as planned either.
bool readable(PyObject* tensor, View& view) {
  return describable(tensor, view) && (view.data || !numel(view));
}

bool is_counter(const View& view) {
  const bool real = view.dtype.code == 2 && (view.dtype.bits == 32 || view.dtype.bits == 64);
  return view.device == on_cpu && real && numel(view) == 1;
}

// The trees of all gradients, those of one after those of another.
struct Trees {
  const std::vector<Squares>& all;
  std::vector<int64_t> first;
  std::vector<float> sums;
  float norm = 0;
};

void sum_trees(void* context, int share, int shares) {
  Trees& trees = *static_cast<Trees*>(context);
  const auto total = int64_t(trees.sums.size());
  const int64_t begin = total * share / shares, end = total * (share + 1) / shares;
  size_t at = size_t(std::upper_bound(trees.first.begin(), trees.first.end(), begin) - trees.first.begin());
  for (at -= at > 0; at < trees.all.size() && trees.first[at] < end; ++at) {
    const int64_t first = trees.first[at];
    const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, trees.all[at].trees());
    if (from < to) kernels()->square_sums(trees.all[at], from, to, trees.sums.data() + first);
  }
}

}  // namespace

float norm(const std::vector<Squares>& all, int threads) {
  Trees trees{all, {}, {}};
  int64_t total = 0;
  for (const Squares& squares : all) {
    trees.first.push_back(total);
    total += squares.trees();
  }
  trees.sums.resize(size_t(total));
  const int64_t useful = (total * tree_size + elements_per_thread - 1) / elements_per_thread;
  const auto finish = [](void* context, int, int) {
    Trees& trees = *static_cast<Trees*>(context);
    trees.norm = norm_of(std::move(trees.sums));
  };
  Py_BEGIN_ALLOW_THREADS;
  const int team = int(std::min<int64_t>(threads, useful));
  parallel(team, team > 1 ? team * shares_per_thread : 1, sum_trees, &trees);
  parallel(1, 1, finish, &trees);  // in the default floating-point mode too
  Py_END_ALLOW_THREADS;
  return trees.norm;
}

Plan::Plan(std::vector<GroupSpec> specs, PyObject* state, PyObject* groups, PyObject* params, PyObject* fresh,
           PyObject* others, bool for_gpu)
    : for_gpu_(for_gpu), specs_(std::move(specs)) {
  for (size_t index = 0; index < specs_.size(); ++index) {
    PyObject* list = PyDict_GetItem(PyList_GET_ITEM(groups, index), interned().params);
    if (!list || !PyList_Check(list)) {
      PyErr_SetString(PyExc_TypeError, "a group's \"params\" must be a list");
      throw PythonError{};
    }
    group_sizes_.push_back(PyList_GET_SIZE(list));
    for (Py_ssize_t i = 0; i < group_sizes_.back(); ++i) {
      Entry& entry = entries_.emplace_back();
      entry.param = PyList_GET_ITEM(list, i);
      entry.group = int(index);
      entry.number = specs_[index].first_parameter + uint64_t(i);
      entry.distributed = PyObject_HasAttr(entry.param, interned().local);
      const auto is_in = [&entry](PyObject* set) {
        const int found = PySet_Contains(set, entry.param);
        if (found < 0) throw PythonError{};
        return bool(found);
      };
      entry.fresh = is_in(fresh);
      entry.other = is_in(others);
      entry.planned = is_in(params) && plan_entry(entry, state);
      if (entry.planned && !for_gpu_ && specs_[index].rule < 0) {
        PyErr_SetString(PyExc_ValueError, "a rule has no kernel for the CPU");
        throw PythonError{};
      }
    }
  }
  std::unordered_map<PyObject*, int> index_of;
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].planned && entries_[i].keys) index_of[entries_[i].param] = int(i);
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    const auto found = index_of.find(key);
    state_order_.push_back(found == index_of.end() ? -1 : found->second);
  }
  kept_.clear();
}

// Keeps a reference until the step is over.
PyObject* Plan::keep(PyObject* owned) {
  if (!owned) throw PythonError{};
  kept_.emplace_back(owned);
  return owned;
}

// The tensor that is stepped, borrowed: a DTensor's shard, or the tensor itself.
PyObject* Plan::local(const Entry& entry, PyObject* tensor) {
  return entry.distributed ? keep(PyObject_GetAttr(tensor, interned().local)) : tensor;
}

// The exchange API hands out the raw memory of conjugate and negative views, and none of torch's tensors of zeros alone:
// those are computed first.
PyObject* Plan::resolved(PyObject* grad) {
  const Interned& name = interned();
  if (is_complex(Described(grad)) && keep(PyObject_CallMethodNoArgs(grad, name.is_conj)) == Py_True)
    grad = keep(PyObject_CallMethodNoArgs(grad, name.resolve_conj));
  if (keep(PyObject_CallMethodNoArgs(grad, name.is_neg)) == Py_True)
    grad = keep(PyObject_CallMethodNoArgs(grad, name.resolve_neg));
  if (keep(PyObject_CallMethodNoArgs(grad, name.is_zerotensor)) == Py_True)
    grad = keep(PyObject_CallMethodNoArgs(grad, name.clone));
  return grad;
}

bool Plan::plan_entry(Entry& entry, PyObject* state) {
  const GroupSpec& spec = specs_[size_t(entry.group)];
  PyObject* dict = PyDict_GetItemWithError(state, entry.param);
  if (!dict && PyErr_Occurred()) throw PythonError{};
  PyObject* param = local(entry, entry.param);
  // A gradient that is not there yet will most likely lie as the parameter does.
  PyObject* grad = keep(PyObject_GetAttr(entry.param, interned().grad));
  if (grad == Py_None) grad = entry.param;
  const Described view(param);
  const bool is_narrow = view.dtype.bits == 16;
  entry.update.stochastic = spec.stochastic && is_narrow;
  entry.update.numel = numel(view);
  entry.is_double = view.dtype.bits == (is_complex(view) ? 128 : 64);
  entry.is_ordered = is_ordered(entry, dict);
  const std::vector<int> order = entry.is_ordered ? row_major_order(view) : walking_order(view);
  entry.param_form = plan_form(param, order, entry.update.param);
  PyObject* stored = local(entry, grad);
  entry.squares.numel = entry.update.numel;
  plan_grad(entry, stored, order);
  entry.tensor_hints = uint32_t(hints_.size());
  hint_tensor(param);
  hint_tensor(stored);
  entry.state_hints = entry.end_hints = uint32_t(hints_.size());
  const bool has_master = spec.has_master && is_narrow;
  const bool has_state = !spec.states.empty() || !spec.counters.empty() || has_master;
  if (has_state && !(dict && plan_state(entry, dict, order, has_master))) return false;
  if (for_gpu_) plan_launch(entry, order);
  return true;
}

void Plan::plan_grad(Entry& entry, PyObject* stored, const std::vector<int>& order) {
  PyObject* grad = resolved(stored);
  entry.grad_form = plan_form(grad, order, entry.update.grad);
  entry.in_place = grad == stored && !entry.update.grad.layout;
  // By its own order in memory, whatever order the parameter is walked in.
  plan_form(grad, walking_order(Described(grad)), entry.squares.grad);
}

// Takes a gradient that lies otherwise than the last one, or is of another dtype. Not where forms never end.
bool Plan::replan_grad(Entry& entry, PyObject* stored, const View& view) {
  const Described param(local(entry, entry.param));
  const bool same_shape = view.ndim == param.ndim && std::equal(view.shape, view.shape + view.ndim, param.shape);
  const bool valid = same_shape && view.device == param.device && is_complex(view) == is_complex(param) &&
                     is_floating(view);
  if (for_gpu_ || !valid || forms_.size() > 64 + 8 * entries_.size()) return false;
  plan_grad(entry, stored, entry.is_ordered ? row_major_order(param) : walking_order(param));
  return true;
}

// Whether elements are walked in row-major order, which blocks of codes and random numbers go by.
bool Plan::is_ordered(const Entry& entry, PyObject* dict) const {
  if (entry.update.stochastic) return true;
  for (const std::string& name : specs_[size_t(entry.group)].states) {
    PyObject* state = dict ? PyDict_GetItemString(dict, (name + scale_suffix).c_str()) : nullptr;
    if (state) return true;
  }
  return false;
}

void Plan::hint(const void* address, int lines) {
  const auto* first = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(address) & ~uintptr_t(cache_line - 1));
  for (int line = 0; line < lines; ++line) hints_.push_back(first + line * cache_line);
}

// The Python object, torch's tensor and its storage, whose addresses torch tells as `_cdata`.
void Plan::hint_tensor(PyObject* tensor) {
  const auto address = [](PyObject* object) {
    const Object number(object ? PyObject_GetAttr(object, interned().cdata) : nullptr);
    return number ? PyLong_AsVoidPtr(number.get()) : nullptr;
  };
  const Object storage(PyObject_CallMethodNoArgs(tensor, interned().untyped_storage));
  hint(tensor, 2);
  hint(address(tensor), 4);
  hint(address(storage.get()), 2);
  PyErr_Clear();
}

const Form* Plan::plan_form(PyObject* tensor, const std::vector<int>& order, Operand& operand) {
  const Described view(tensor);
  // The last forms first: a parameter, its gradient and its states are mostly of one form. The walking order follows
  // from the parameter's strides, so that a form found must also lie alike.
  Form form(view, order);
  const auto same = [&](const Form& known) { return known.fits(view) && known.lies_like(form); };
  const auto recent = forms_.end() - std::min<ptrdiff_t>(ptrdiff_t(forms_.size()), 64);
  auto found = std::find_if(recent, forms_.end(), same);
  if (found == forms_.end()) found = forms_.insert(forms_.end(), std::move(form));
  operand.storage = found->storage();
  operand.layout = found->layout();
  return &*found;
}

bool Plan::plan_state(Entry& entry, PyObject* dict, const std::vector<int>& order, bool has_master) {
  const GroupSpec& spec = specs_[size_t(entry.group)];
  Keys keys;
  size_t missing = spec.states.size() + spec.counters.size() + has_master;
  bool scaled[max_states] = {};
  PyObject *key, *value;
  hint(dict, 1);
  hint(reinterpret_cast<PyDictObject*>(dict)->ma_keys, 3);
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    const auto [kind, index] = kind_of(key, spec, has_master);
    keys.names.emplace_back(Py_NewRef(key));
    keys.kinds.emplace_back(kind, index);
    if (kind == Kind::ignored) continue;
    PyObject* tensor = kind == Kind::counter ? value : local(entry, value);
    hint_tensor(tensor);
    missing -= kind != Kind::scale;
    if (kind == Kind::state) {
      entry.state_form[index] = plan_form(tensor, order, entry.update.state[index]);
    } else if (kind == Kind::master) {
      entry.master_form = plan_form(tensor, order, entry.update.master);
    } else if (kind == Kind::scale) {
      Operand scale;
      entry.scale_form[index] = plan_form(tensor, row_major_order(Described(tensor)), scale);
      const int64_t blocks = (entry.update.numel + int8_block - 1) / int8_block;
      scaled[index] = scale.storage == Storage::float32 && !scale.layout && numel(Described(tensor)) >= blocks;
    } else {
      hint(Described(value).data, 1);
    }
  }
  for (size_t i = 0; i < spec.states.size() && !missing; ++i) {
    Operand& state = entry.update.state[i];
    if (state.storage != Storage::int8_signed) continue;
    if (!scaled[i]) return false;
    state.storage = spec.is_signed[i] ? Storage::int8_signed : Storage::int8_unsigned;
  }
  const bool same = !keys_.empty() && keys_.back().kinds == keys.kinds && std::equal(
      keys.names.begin(), keys.names.end(), keys_.back().names.begin(),
      [](const Object& a, const Object& b) { return same_name(a.get(), b.get()); });
  if (!same) keys_.push_back(std::move(keys));
  entry.keys = &keys_.back();
  entry.end_hints = uint32_t(hints_.size());
  return !missing;
}

std::pair<Plan::Kind, int> Plan::kind_of(PyObject* key, const GroupSpec& spec, bool has_master) const {
  const char* text = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : nullptr;
  const std::string name = text ? text : "";
  for (size_t i = 0; i < spec.states.size(); ++i) {
    if (name == spec.states[i]) return {Kind::state, int(i)};
    if (name == spec.states[i] + scale_suffix) return {Kind::scale, int(i)};
  }
  for (size_t i = 0; i < spec.counters.size(); ++i)
    if (name == spec.counters[i]) return {Kind::counter, int(i)};
  return {has_master && name == "master" ? Kind::master : Kind::ignored, 0};
}

bool Plan::refresh(PyObject* state, PyObject* groups) {
  if (size_t(PyList_GET_SIZE(groups)) != specs_.size()) return false;
  size_t at_entry = 0;
  for (size_t index = 0; index < specs_.size(); ++index) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(groups, index), interned().params);
    if (!params || !PyList_Check(params) || PyList_GET_SIZE(params) != group_sizes_[index]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[index]; ++i, ++at_entry)
      if (PyList_GET_ITEM(params, i) != entries_[at_entry].param) return false;
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i + hint_distance < entries_.size()) {
      const Entry& coming = entries_[i + hint_distance];
      fetch_ahead(hints_.data() + coming.tensor_hints, hints_.data() + coming.state_hints);
    }
    if (!refresh_tensors(entries_[i])) return false;
  }

  if (size_t(PyDict_Size(state)) != state_order_.size()) return false;
  PyObject *key, *value;
  size_t at_key = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++at_key) {
    if (at_key + hint_distance < state_order_.size() && state_order_[at_key + hint_distance] >= 0) {
      const Entry& coming = entries_[size_t(state_order_[at_key + hint_distance])];
      fetch_ahead(hints_.data() + coming.state_hints, hints_.data() + coming.end_hints);
    }
    const int index = state_order_[at_key];
    if (index < 0) continue;
    Entry& entry = entries_[size_t(index)];
    if (key != entry.param || !PyDict_Check(value)) return false;
    if (entry.active && !refresh_state(entry, value)) return false;
  }
  for (Entry& entry : entries_)
    if (entry.active) find_scalars(entry);
  return true;
}

bool Plan::refresh_tensors(Entry& entry) {
  if (entry.other) return true;
  PyObject* grad = keep(PyObject_GetAttr(entry.param, interned().grad));
  entry.active = grad != Py_None;
  if (!entry.active) return true;
  if (!entry.planned) return false;
  grad = local(entry, grad);
  View view;
  if (!describable(grad, view)) return false;
  // A negative view is the imaginary part of a conjugate, whose elements lie two apart, so that a gradient that lies in
  // one piece as planned need not be asked. A conjugate may lie anyhow.
  const bool in_one_piece =
      view.data && !entry.update.grad.layout && entry.update.numel > 1 && entry.grad_form->fits(view);
  if (is_complex(view) || !in_one_piece) {
    PyObject* const stored = grad;
    grad = resolved(grad);
    if (!readable(grad, view)) return false;
    const bool fits = entry.grad_form->fits(view) && (grad == stored || !entry.in_place);
    if (!fits && !replan_grad(entry, stored, view)) return false;
  }
  entry.update.grad.data = view.data;
  PyObject* param = local(entry, entry.param);
  keep(Py_NewRef(param));
  if (!readable(param, view) || !entry.param_form->fits(view)) return false;
  entry.update.param.data = view.data;
  return true;
}

bool Plan::refresh_state(Entry& entry, PyObject* dict) {
  if (size_t(PyDict_Size(dict)) != entry.keys->kinds.size()) return false;
  PyObject *key, *value;
  size_t at_key = 0;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++at_key) {
    const auto [kind, index] = entry.keys->kinds[at_key];
    if (!same_name(key, entry.keys->names[at_key].get())) return false;
    if (kind == Kind::ignored) continue;
    PyObject* tensor = keep(Py_NewRef(kind == Kind::counter ? value : local(entry, value)));
    View view;
    if (!readable(tensor, view)) return false;
    if (kind == Kind::state) {
      if (!entry.state_form[index]->fits(view)) return false;
      entry.update.state[index].data = view.data;
    } else if (kind == Kind::scale) {
      if (!entry.scale_form[index]->fits(view)) return false;
      entry.update.state[index].scale = reinterpret_cast<float*>(view.data);
    } else if (kind == Kind::master) {
      if (!entry.master_form->fits(view)) return false;
      entry.update.master.data = view.data;
    } else {
      if (!is_counter(view)) return false;
      entry.counters[index] = {view.data, view.dtype.bits == 64};
    }
  }
  return true;
}

void Plan::find_scalars(Entry& entry) {
  if (specs_[size_t(entry.group)].captured) return;
  double counters[max_counters];
  size_t count = specs_[size_t(entry.group)].counters.size();
  for (size_t i = 0; i < count; ++i) counters[i] = entry.counters[i].read();
  // A rule without a step count still tells the first step from the others.
  if (count == 0) counters[count++] = entry.fresh ? 0 : 1;
  // Mostly the last ones; but parameters that are stepped now and then, as experts are, each have a count of their own.
  if (!scalars_.empty()) {
    const Scalars& last = scalars_.back();
    entry.scalars = int(scalars_.size()) - 1;
    if (last.group == entry.group && std::equal(counters, counters + count, last.counters.begin())) return;
  }
  ScalarsKey key = {uint64_t(entry.group)};
  std::memcpy(&key[1], counters, count * sizeof counters[0]);
  const auto [found, is_new] = scalars_of_.try_emplace(key, int(scalars_.size()));
  entry.scalars = found->second;
  if (is_new) scalars_.push_back({entry.group, std::vector<double>(counters, counters + count), {}, {}});
}

void Plan::compute_scalars(PyObject* function) {
  const auto numbers = [](PyObject* tuple, std::vector<double>& out) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
      out.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i)));
    if (PyErr_Occurred()) throw PythonError{};
  };
  for (Scalars& scalars : scalars_) {
    PyObject* arguments = keep(PyTuple_New(Py_ssize_t(scalars.counters.size() + 1)));
    PyTuple_SET_ITEM(arguments, 0, PyLong_FromLong(scalars.group));
    for (size_t i = 0; i < scalars.counters.size(); ++i)
      PyTuple_SET_ITEM(arguments, Py_ssize_t(i + 1), PyFloat_FromDouble(scalars.counters[i]));
    PyObject* result = keep(PyObject_CallObject(function, arguments));
    numbers(PyTuple_GET_ITEM(result, 0), scalars.values);
    if (scalars.values.size() != size_t(specs_[size_t(scalars.group)].scalars)) {
      PyErr_SetString(PyExc_RuntimeError, "a rule got another number of scalars than it was planned with");
      throw PythonError{};
    }
    numbers(PyTuple_GET_ITEM(result, 1), scalars.advanced);
  }
}

bool Plan::begin(PyObject* state, PyObject* groups, PyObject* scalars) {
  if (running_) {
    PyErr_SetString(PyExc_RuntimeError, "this optimizer's step is already running, in another thread or in its scalars");
    throw PythonError{};
  }
  running_ = true;
  try {
    scalars_.clear();
    scalars_of_.clear();
    if (refresh(state, groups)) {
      compute_scalars(scalars);
      return true;
    }
  } catch (...) {
    end();
    throw;
  }
  end();
  return false;
}

void Plan::end() {
  kept_.clear();
  running_ = false;
}

Object Plan::step(PyObject* state, PyObject* groups, PyObject* scalars, int threads, double grad_scale,
                  const Draws& draws, std::optional<double> max_grad_norm, bool zero_grads) {
  if (!begin(state, groups, scalars)) return nullptr;
  struct Ending {
    Plan& plan;
    ~Ending() { plan.end(); }
  } ending{*this};
  Object list = stepped();
  if (max_grad_norm) {
    std::vector<Squares> all;
    for (Entry& entry : entries_) {
      if (!entry.active) continue;
      entry.squares.grad.data = entry.update.grad.data;
      entry.squares.scale = float(grad_scale);
      all.push_back(entry.squares);
    }
    grad_norm_ = norm(all, threads);
    grad_scale *= clip_coefficient(grad_norm_, *max_grad_norm);
  }
  run(threads, grad_scale, draws, zero_grads);
  count();
  return list;
}

Object Plan::stepped() const {
  Object list(PyList_New(0));
  for (const Entry& entry : entries_)
    if (entry.active && (!list || PyList_Append(list.get(), entry.param))) throw PythonError{};
  if (!list) throw PythonError{};
  return list;
}

void Plan::run(int threads, double grad_scale, const Draws& draws, bool zero_grads) {
  left_grads_ = false;
  struct Work {
    std::vector<std::pair<const Update*, UpdateRange>> updates;
    std::vector<int64_t> first;  // elements before each update
    int64_t total = 0;
  } work;
  work.updates.reserve(entries_.size());
  work.first.reserve(entries_.size());
  for (Entry& entry : entries_) {
    if (!entry.active) continue;
    const GroupSpec& spec = specs_[size_t(entry.group)];
    entry.update.grad_scale = spec.maximize ? -grad_scale : grad_scale;
    entry.update.zero_grad = zero_grads && entry.in_place;
    left_grads_ |= zero_grads && !entry.in_place;
    entry.update.scalar = scalars_[size_t(entry.scalars)].values.data();
    if (entry.update.stochastic) {
      const auto [seed, step] = draws[size_t(entry.group)];
      entry.update.key = rounding_key(seed, step, entry.number);
    }
    work.updates.emplace_back(&entry.update, update_kernel(spec.rule, entry.is_double));
    work.first.push_back(work.total);
    work.total += entry.update.numel;
  }
  const auto task = [](void* context, int share, int shares) {
    const Work& work = *static_cast<const Work*>(context);
    const int64_t begin = work.total / shares * share + std::min<int64_t>(share, work.total % shares);
    const int64_t end = work.total / shares * (share + 1) + std::min<int64_t>(share + 1, work.total % shares);
    size_t at = size_t(std::upper_bound(work.first.begin(), work.first.end(), begin) - work.first.begin());
    for (at -= at > 0; at < work.updates.size() && work.first[at] < end; ++at) {
      const auto [update, kernel] = work.updates[at];
      // Cut between blocks, so that one is read and written by one thread.
      const int64_t from = whole_blocks(std::max<int64_t>(begin - work.first[at], 0));
      const int64_t to = std::min(whole_blocks(end - work.first[at]), update->numel);
      if (from < to) kernel(*update, from, to);
    }
  };
  const int64_t useful = (work.total + elements_per_thread - 1) / elements_per_thread;
  Py_BEGIN_ALLOW_THREADS;
  const int team = int(std::min<int64_t>(threads, useful));
  parallel(team, team > 1 ? team * shares_per_thread : 1, task, &work);
  Py_END_ALLOW_THREADS;
}

void Plan::count() {
  for (Entry& entry : entries_) {
    if (!entry.active || specs_[size_t(entry.group)].captured) continue;
    const std::vector<double>& advanced = scalars_[size_t(entry.scalars)].advanced;
    for (size_t i = 0; i < specs_[size_t(entry.group)].counters.size(); ++i) entry.counters[i].write(advanced[i]);
    entry.fresh = false;
  }
}

}  // namespace fusedopt
