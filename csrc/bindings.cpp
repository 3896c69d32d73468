#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/threads.h"
#include "plan.h"

namespace py = pybind11;
using namespace fusedopt;

namespace {

GroupSpec make_spec(const std::string& rule, bool maximize, std::vector<std::string> states,
                    std::vector<bool> is_signed, std::vector<std::string> counters, bool has_master, bool stochastic,
                    uint64_t first_parameter) {
  const int index = find_rule(rule);
  if (index < 0) throw py::value_error("rule '" + rule + "' is not in the native module; rebuild it");
  if (counters.size() > max_counters) throw py::value_error("a rule has at most two counters");
  return {index, maximize, std::move(states), std::move(is_signed), std::move(counters), has_master, stochastic,
          first_parameter};
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
      .def(py::init(&make_spec), py::kw_only(), py::arg("rule"), py::arg("maximize"), py::arg("states"),
           py::arg("is_signed"), py::arg("counters"), py::arg("has_master"), py::arg("stochastic"),
           py::arg("first_parameter"));
  py::class_<Plan>(module, "Plan")
      .def(py::init([](const std::vector<GroupSpec>& specs, py::dict state, py::list groups, py::set fresh) {
             return std::make_unique<Plan>(specs, state.ptr(), groups.ptr(), fresh.ptr());
           }),
           py::arg("specs"), py::arg("state"), py::arg("groups"), py::arg("fresh"))
      .def("step",
           [](Plan& plan, py::dict state, py::list groups, py::function scalars, int threads, double grad_scale,
              const Draws& draws, std::optional<double> max_grad_norm, bool zero_grads) {
             Object stepped = plan.step(state.ptr(), groups.ptr(), scalars.ptr(), threads, grad_scale, draws,
                                        max_grad_norm, zero_grads);
             return stepped ? py::reinterpret_steal<py::object>(stepped.release()) : py::object(py::none());
           })
      .def_property_readonly("grad_norm", &Plan::grad_norm)
      .def_property_readonly("left_grads", &Plan::left_grads);
  module.def("norm", &norm_of_grads, py::arg("grads"), py::arg("threads"), "The norm of these tensors together.");
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
