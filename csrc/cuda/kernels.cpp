#include "kernels.h"

#include "../rules.h"

namespace fusedopt {

#if defined(FUSEDOPT_CUDA_TOOLKIT)
// The files lie where the assembler is told to look. The driver wants images on 8 bytes.
#define FUSEDOPT_IMAGE(NAME)                                                                               \
  asm(".section .rodata\n.balign 64\nfusedopt_" #NAME "_begin:\n.incbin \"" #NAME ".fatbin\"\nfusedopt_" #NAME \
      "_end:\n.byte 0\n.previous");                                                                         \
  extern "C" __attribute__((visibility("hidden"))) const char fusedopt_##NAME##_begin[], fusedopt_##NAME##_end[];
FUSEDOPT_RULES(FUSEDOPT_IMAGE)
FUSEDOPT_IMAGE(norm)

const CudaBuild cuda_build = {FUSEDOPT_CUDA_TOOLKIT, FUSEDOPT_CUDA_ARCHITECTURES};
#define FUSEDOPT_ADDRESS(NAME) {fusedopt_##NAME##_begin, fusedopt_##NAME##_end},
const CudaImage cuda_step_images[] = {FUSEDOPT_RULES(FUSEDOPT_ADDRESS)};
const CudaImage cuda_norm_image = {fusedopt_norm_begin, fusedopt_norm_end};
#else
const CudaBuild cuda_build = {"", ""};
#define FUSEDOPT_ADDRESS(NAME) {nullptr, nullptr},
const CudaImage cuda_step_images[] = {FUSEDOPT_RULES(FUSEDOPT_ADDRESS)};
const CudaImage cuda_norm_image = {nullptr, nullptr};
#endif

}  // namespace fusedopt
