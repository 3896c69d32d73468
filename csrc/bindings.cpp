#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/threads.h"
#include "ops.h"
#include "plan.h"
#include "registry.h"
#include "source.h"

namespace py = pybind11;
using namespace fusedopt;

namespace fusedopt {
void bind_cuda(py::module_&);
void bind_matmul(py::module_&);
}

namespace {

int rule_number(const std::string& name) {
  const int rule = find_rule(name);
  if (rule < 0) throw py::value_error("rule '" + name + "' is not in the native module; rebuild it");
  return rule;
}

int add_rule_at(std::string name, int states, int scalars, uintptr_t in_float32, uintptr_t in_float64) {
  return add_rule({std::move(name), states, scalars}, reinterpret_cast<UpdateRange>(in_float32),
                  reinterpret_cast<UpdateRange>(in_float64));
}

GroupSpec make_spec(int rule, int scalars, bool maximize, std::vector<std::string> states,
                    std::vector<bool> is_signed, std::vector<std::string> counters, bool has_master, bool stochastic,
                    uint64_t first_parameter, bool captured) {
  if (rule >= rule_count()) throw py::value_error("there is no rule number " + std::to_string(rule));
  if (rule >= 0 && (rule_info(rule).states != int(states.size()) || rule_info(rule).scalars != scalars))
    throw py::value_error("rule '" + rule_info(rule).name + "' is not this version's in the native module; rebuild it");
  if (counters.size() > max_counters) throw py::value_error("a rule has at most two counters");
  return {rule, scalars, maximize, std::move(states), std::move(is_signed), std::move(counters), has_master, stochastic,
          first_parameter, captured};
}

float norm_of_grads(const py::list& grads, int threads) {
  std::deque<Form> forms;
  std::vector<Squares> all;
  for (const py::handle grad : grads) {
    View view;
    if (!describe(grad.ptr(), view)) throw PythonError{};
    const Form& form = forms.emplace_back(view, walking_order(view));
    Squares& squares = all.emplace_back();
    squares.grad = {view.data, form.storage(), form.layout(), nullptr};
    squares.numel = numel(view);
  }
  return norm(all, threads);
}

// Memory of the plan's, to be copied before its next step.
template <class T>
py::memoryview lent(const std::vector<T>& values) {
  return py::memoryview::from_memory(const_cast<T*>(values.data()), py::ssize_t(values.size() * sizeof(T)));
}

// As fusedopt.kernels.driver.Launch has it.
py::tuple form_of(const LaunchForm& form) {
  py::tuple states(form.states);
  for (int i = 0; i < form.states; ++i) states[size_t(i)] = storage_name(form.state[i]);
  const py::object master = form.has_master ? py::object(py::str(storage_name(form.master))) : py::none();
  return py::make_tuple(storage_name(form.param), storage_name(form.grad), states, master, form.stochastic,
                        form.aligned, form.dims, form.zero_grad);
}

std::vector<std::pair<int, const Launch*>> launches_of(const Plan& plan) {
  std::vector<std::pair<int, const Launch*>> found;
  for (const int place : plan.launches().used()) found.emplace_back(place, &plan.launches().at(place));
  return found;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto* known = available_kernels(); *known; ++known) names.emplace_back((*known)->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "fusedopt's native CPU backend. It knows addresses and sizes, not torch.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const PythonError&) {
    }
  });
  py::class_<GroupSpec>(module, "GroupSpec")
      .def(py::init(&make_spec), py::kw_only(), py::arg("rule"), py::arg("scalars"), py::arg("maximize"), py::arg("states"),
           py::arg("is_signed"), py::arg("counters"), py::arg("has_master"), py::arg("stochastic"),
           py::arg("first_parameter"), py::arg("captured"));
  py::class_<Launch>(module, "Launch")
      .def_property_readonly("form", [](const Launch& launch) { return form_of(launch.form); })
      .def_property_readonly("group", [](const Launch& launch) { return launch.form.group; })
      .def_property_readonly("device", [](const Launch& launch) { return launch.form.device; })
      .def_property_readonly("captured", [](const Launch& launch) { return launch.form.captured; })
      .def_property_readonly("table", [](const Launch& launch) { return lent(launch.table); })
      .def_property_readonly("scalars", [](const Launch& launch) { return lent(launch.scalars); })
      .def_property_readonly("tiles", [](const Launch& launch) { return lent(launch.tiles); })
      .def_readonly("parameters", &Launch::parameters)
      .def_readonly("new_table", &Launch::new_table)
      .def_readonly("new_scalars", &Launch::new_scalars)
      .def_readonly("new_tiles", &Launch::new_tiles);
  py::class_<NormLaunch>(module, "NormLaunch")
      .def_property_readonly("grad", [](const NormLaunch& launch) { return storage_name(launch.grad); })
      .def_readonly("device", &NormLaunch::device)
      .def_readonly("aligned", &NormLaunch::aligned)
      .def_property_readonly("table", [](const NormLaunch& launch) { return lent(launch.table); })
      .def_readonly("trees", &NormLaunch::trees);
  py::class_<Plan>(module, "Plan")
      .def(py::init([](const std::vector<GroupSpec>& specs, py::dict state, py::list groups, py::set params,
                       py::set fresh, py::set others, bool for_gpu) {
             return std::make_unique<Plan>(specs, state.ptr(), groups.ptr(), params.ptr(), fresh.ptr(), others.ptr(),
                                           for_gpu);
           }),
           py::arg("specs"), py::arg("state"), py::arg("groups"), py::arg("params"), py::arg("fresh"),
           py::arg("others"), py::arg("for_gpu"))
      .def("step",
           [](Plan& plan, py::dict state, py::list groups, py::function scalars, int threads, double grad_scale,
              const Draws& draws, std::optional<double> max_grad_norm, bool zero_grads) {
             Object stepped = plan.step(state.ptr(), groups.ptr(), scalars.ptr(), threads, grad_scale, draws,
                                        max_grad_norm, zero_grads);
             return stepped ? py::reinterpret_steal<py::object>(stepped.release()) : py::object(py::none());
           })
      .def("prepare",
           [](Plan& plan, py::dict state, py::list groups, py::function scalars, double grad_scale, const Draws& draws,
              bool clips, bool zero_grads) {
             return plan.prepare(state.ptr(), groups.ptr(), scalars.ptr(), grad_scale, draws, clips, zero_grads);
           })
      .def("finish",
           [](Plan& plan, bool done) {
             Object stepped = plan.finish(done);
             return stepped ? py::reinterpret_steal<py::object>(stepped.release()) : py::object(py::none());
           })
      .def_property_readonly("launches", &launches_of, py::return_value_policy::reference_internal)
      .def_property_readonly("norm_launches", &Plan::norm_launches, py::return_value_policy::reference_internal)
      .def_property_readonly("grad_norm", &Plan::grad_norm)
      .def_property_readonly("left_grads", &Plan::left_grads);
  bind_cuda(module);
  module.def("rule_number", &rule_number, py::arg("name"), "Of a rule of rules.h, for GroupSpec.");
  module.def("add_rule", &add_rule_at, py::arg("name"), py::arg("states"), py::arg("scalars"), py::arg("in_float32"),
             py::arg("in_float64"), "The number of a user's rule, whose kernels lie at these addresses.");
  module.def("kernel_headers", &kernel_headers, "Text of the headers a user's rule is compiled with, by file name.");
  module.def("kernel_flags", &kernel_flags, "The flags it is compiled with, by instruction set.");
  module.attr("max_states") = max_states;
  module.attr("max_scalars") = max_scalars;
  module.def("norm", &norm_of_grads, py::arg("grads"), py::arg("threads"), "The norm of these tensors together.");
  bind_ops(module);
  bind_matmul(module);
  module.def("instruction_sets", &instruction_sets, "Those this machine runs, best first.");
  module.def("instruction_set", [] { return kernels()->name; }, "The one in use.");
  module.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!use_kernels(name)) throw py::value_error("this machine does not run instruction set '" + name + "'");
      },
      py::arg("name"));
  module.def("thread_runtime", &thread_runtime);
  module.def(
      "use_exchange_api",
      [](py::object capsule) {
        if (!use_exchange_api(capsule.ptr())) throw py::error_already_set();
      },
      py::arg("capsule"), "torch.Tensor.__dlpack_c_exchange_api__, or None to read tensors by their methods.");
}
