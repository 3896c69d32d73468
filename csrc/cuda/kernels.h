// The kernels as they were compiled: one image for each rule, in the order of FUSEDOPT_RULES, and one of the norm.
#pragma once

namespace fusedopt {

struct CudaBuild {
  const char* toolkit;        // its version, like "13.0"; empty where the module was built without
  const char* architectures;  // like "80 90"
};

struct CudaImage {
  const char *begin, *end;
};

extern const CudaBuild cuda_build;
extern const CudaImage cuda_step_images[];
extern const CudaImage cuda_norm_image;

}  // namespace fusedopt
