// The launches of CUDA kernels, through the driver that torch has loaded: nothing is linked against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../launch.h"

namespace fusedopt {

// Why the kernels do not run on this device, and the remedy; empty where they do.
std::string cuda_unavailable(int device);

// Bytes of table and scalars that a launch takes by value.
int64_t cuda_argument_limit(int device);

// float32 numbers that `cuda_norm` needs for the sums of so many trees.
int64_t cuda_norm_sums(int64_t trees);

// Load a launch's kernels. The launch itself then neither allocates nor waits, and may be captured.
void cuda_prepare(const Launch& launch);
void cuda_prepare_norm(int device);

// Enqueue one launch. Addresses are those of device memory. `control`: two float64, a factor of the gradients, and 0 or
// that nothing is to be written. `table`, `scalars`: copies of the launch's own; 0 where they are to go by value, for
// which there must be room.
void cuda_step(const Launch& launch, uint64_t stream, uint64_t control, uint64_t table, uint64_t scalars);

// Enqueue the launches that find the norm of the gradients, each multiplied by control_in[0]: float32 at `norm`. What
// they are to be multiplied by to have at most `max_norm` becomes a factor of control_out[0]; control_out[1] is
// control_in[1]. `sums`: cuda_norm_sums(trees of all launches). `tables`: a copy of the launches' tables, one after the
// other; 0 where each goes by value.
void cuda_norm(const std::vector<NormLaunch>& launches, int device, uint64_t stream, uint64_t control_in,
               double max_norm, uint64_t sums, uint64_t tables, uint64_t control_out, uint64_t norm);

}  // namespace fusedopt
