#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../registry.h"
#include "driver.h"
#include "kernels.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

Storage storage_of(const std::string& name) {
  for (int i = 0; i <= int(Storage::low8); ++i)
    if (name == storage_name(Storage(i))) return Storage(i);
  throw py::value_error("there is no storage '" + name + "'");
}

Launch make_launch(int device, int rule, const std::string& param, const std::string& grad,
                   const std::vector<std::string>& states, const std::optional<std::string>& master, bool stochastic,
                   bool zero_grad, bool aligned, int dims, std::vector<int64_t> table, std::vector<double> scalars) {
  if (states.size() > max_states) throw py::value_error("a rule has at most four states");
  Launch launch;
  LaunchForm& form = launch.form;
  form.device = device;
  form.rule = rule;
  form.param = storage_of(param);
  form.grad = storage_of(grad);
  form.states = int(states.size());
  for (size_t k = 0; k < states.size(); ++k) form.state[k] = storage_of(states[k]);
  form.has_master = master.has_value();
  form.master = master ? storage_of(*master) : Storage::float32;
  form.stochastic = stochastic;
  form.zero_grad = zero_grad;
  form.aligned = aligned;
  form.dims = dims;
  if (table.size() % size_t(form.width())) throw py::value_error("the table has rows of another width");
  launch.table = std::move(table);
  launch.scalars = std::move(scalars);
  return launch;
}

NormLaunch make_norm_launch(int device, const std::string& grad, bool aligned, std::vector<int64_t> table,
                            int64_t trees) {
  NormLaunch launch;
  launch.device = device;
  launch.grad = storage_of(grad);
  launch.aligned = aligned;
  launch.table = std::move(table);
  launch.trees = trees;
  return launch;
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_toolkit", [] { return cuda_build.toolkit; }, "That compiled the CUDA kernels, or '' without them.");
  module.def("cuda_architectures", [] { return cuda_build.architectures; });
  module.def(
      "cuda_image",
      [](const std::string& name) {
        const int rule = find_rule(name);
        if (rule < 0 && name != "norm") throw py::value_error("there is no rule '" + name + "'");
        const CudaImage& image = rule < 0 ? cuda_norm_image : cuda_step_images[rule];
        return py::bytes(image.begin, size_t(image.end - image.begin));
      },
      py::arg("name"), "The compiled kernels of a rule, or of 'norm', for CUDA's tools.");
  module.def("cuda_unavailable", &cuda_unavailable, py::arg("device"),
             "Why the CUDA kernels do not run on this device, or ''.");
  module.def("cuda_argument_limit", &cuda_argument_limit, py::arg("device"),
             "Bytes of table and scalars that a launch takes by value.");
  module.def("cuda_norm_sums", &cuda_norm_sums, py::arg("trees"), "Numbers that cuda_norm needs for its sums.");
  module.def("cuda_prepare", &cuda_prepare, py::arg("launch"), "Load its kernel, so that cuda_step may be captured.");
  module.def("cuda_prepare_norm", &cuda_prepare_norm, py::arg("device"), "Likewise for cuda_norm.");
  module.def("cuda_step", &cuda_step, py::arg("launch"), py::arg("stream"), py::arg("control"), py::arg("table") = 0,
             py::arg("scalars") = 0, "Enqueue a launch; csrc/cuda/driver.h says what the addresses are.");
  module.def("cuda_norm", &cuda_norm, py::arg("launches"), py::arg("device"), py::arg("stream"),
             py::arg("control_in"), py::arg("max_norm"), py::arg("sums"), py::arg("tables"), py::arg("control_out"),
             py::arg("norm"), "Enqueue the norm of gradients and the factor that clips it.");
  module.def("make_launch", &make_launch, py::kw_only(), py::arg("device"), py::arg("rule"), py::arg("param"),
             py::arg("grad"), py::arg("states"), py::arg("master"), py::arg("stochastic"), py::arg("zero_grad"),
             py::arg("aligned"), py::arg("dims"), py::arg("table"), py::arg("scalars"),
             "A launch without a plan; storage by the names of csrc/codecs.h.");
  module.def("make_norm_launch", &make_norm_launch, py::kw_only(), py::arg("device"), py::arg("grad"),
             py::arg("aligned"), py::arg("table"), py::arg("trees"));
}

}  // namespace fusedopt
