// Python's way to the operations that work along rows.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedopt {

// Adds rms_norm_forward, rms_norm_backward, glu_forward and glu_backward.
void bind_ops(pybind11::module_& module);

}  // namespace fusedopt
