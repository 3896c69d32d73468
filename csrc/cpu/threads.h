// Threads of the OpenMP runtime that torch already uses.
#pragma once

#include "../step.h"

namespace fusedopt {

// Runs task(context, share, shares) for every share, on at most `threads` threads in the default floating-point mode.
// Serial in a forked child, where the parent's pool is gone and libgomp would wait for it for ever.
void parallel(int threads, int shares, void (*task)(void* context, int share, int shares), void* context);

// The runtime's name, or why there is none.
const char* thread_runtime();

// The instruction sets that this machine runs, best first; ends with a null pointer.
const Kernels* const* available_kernels();

// Operands rounded to bfloat16, sums in float32; none where this machine has no instruction for that.
MatmulKernel bfloat16_matmul();

}  // namespace fusedopt
