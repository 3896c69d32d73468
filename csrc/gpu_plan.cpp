// Steps on GPUs: what a plan hands to the kernels.
#include <algorithm>

#include "plan.h"
#include "registry.h"

namespace fusedopt {
namespace {

constexpr uintptr_t alignment = 16;

int64_t word_of(const void* address) { return int64_t(reinterpret_cast<uintptr_t>(address)); }

}  // namespace

void Plan::plan_launch(Entry& entry, const std::vector<int>& order) {
  const GroupSpec& spec = specs_[size_t(entry.group)];
  const Update& update = entry.update;
  LaunchForm& form = entry.form;
  form.group = entry.group;
  form.device = entry.param_form->device();
  form.rule = spec.rule;
  form.states = int(spec.states.size());
  form.param = update.param.storage;
  form.grad = update.grad.storage;
  form.has_master = entry.master_form != nullptr;
  form.master = update.master.storage;
  form.captured = spec.captured;
  // The lower half of a split is exact: nothing is rounded.
  form.stochastic = update.stochastic && !(form.has_master && form.master == Storage::low16);
  bool strided = update.param.layout || update.grad.layout || update.master.layout;
  std::vector<const Form*> forms = {entry.param_form, entry.grad_form, form.has_master ? entry.master_form : nullptr};
  for (int i = 0; i < form.states; ++i) {
    form.state[i] = update.state[i].storage;
    strided |= update.state[i].layout != nullptr;
    forms.push_back(entry.state_form[i]);
  }
  entry.walk.clear();
  if (!strided) return;
  std::vector<const int64_t*> strides;
  for (const Form* each : forms) strides.push_back(each ? each->strides().data() : nullptr);
  entry.walk = joint_walk(entry.param_form->shape(), strides, order, entry.param_form->is_complex(), form.dims);
}

bool Plan::prepare(PyObject* state, PyObject* groups, PyObject* scalars, double grad_scale, const Draws& draws,
                   bool clips, bool zero_grads) {
  if (!begin(state, groups, scalars)) return false;
  fill_launches(grad_scale, draws, zero_grads);
  norm_launches_.reset();
  if (clips) fill_norm_launches();
  return true;
}

Object Plan::finish(bool done) {
  Object list;
  if (done) {
    list = stepped();
    count();
  }
  end();
  return list;
}

void Plan::fill_launches(double grad_scale, const Draws& draws, bool zero_grads) {
  left_grads_ = false;
  launches_.begin();
  std::vector<int64_t> words;
  static const std::vector<double> none;
  for (size_t index = 0; index < entries_.size(); ++index) {
    const Entry& entry = entries_[index];
    if (!entry.active) continue;
    left_grads_ |= zero_grads && !entry.in_place;
    const Update& update = entry.update;
    if (!update.numel) continue;
    LaunchForm form = entry.form;
    form.zero_grad = zero_grads && entry.in_place;
    words = {word_of(update.param.data), word_of(update.grad.data), word_of(update.master.data)};
    uintptr_t addresses = 0;
    for (const int64_t address : words) addresses |= uintptr_t(address);
    for (int i = 0; i < form.states; ++i) {
      words.push_back(word_of(update.state[i].data));
      words.push_back(word_of(update.state[i].scale));
      addresses |= uintptr_t(words[words.size() - 2]);
    }
    form.aligned = !form.dims && addresses % alignment == 0;
    words.insert(words.end(), entry.walk.begin(), entry.walk.end());
    const GroupSpec& spec = specs_[size_t(entry.group)];
    uint64_t key = 0;
    if (form.stochastic) {
      const auto [seed, step] = draws[size_t(entry.group)];
      const Key drawn = rounding_key(seed, step, entry.number);
      key = drawn.first | uint64_t(drawn.second) << 32;
    }
    const std::vector<double>& values = spec.captured ? none : scalars_[size_t(entry.scalars)].values;
    launches_.add(form, update.numel, key, words, int(index), entry.scalars, values,
                  spec.maximize ? -grad_scale : grad_scale);
  }
  launches_.end();
}

void Plan::fill_norm_launches() {
  std::vector<NormLaunch> found;
  int64_t trees = 0;
  for (const Entry& entry : entries_) {
    if (!entry.active || !entry.squares.numel) continue;
    const Operand& grad = entry.squares.grad;
    if (grad.layout || (!found.empty() && found[0].device != entry.form.device)) return;
    const char* data = entry.update.grad.data;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % alignment == 0;
    auto launch = std::find_if(found.begin(), found.end(), [&](const NormLaunch& known) {
      return known.grad == grad.storage && known.aligned == aligned;
    });
    if (launch == found.end()) launch = found.insert(found.end(), {entry.form.device, grad.storage, aligned, {}, 0});
    launch->table.insert(launch->table.end(), {entry.squares.numel, launch->trees, word_of(data), trees});
    launch->trees += entry.squares.trees();
    trees += entry.squares.trees();
  }
  norm_launches_ = std::move(found);
}

}  // namespace fusedopt
