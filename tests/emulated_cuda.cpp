// A stand-in for libcuda.so.1 that runs the kernels of csrc/cuda on the CPU, compiled from the same source.
#include "emulated_cuda.h"
// After it: the kernels' source uses what the compiler for GPUs knows by itself.
#include "../csrc/cuda/norm.cuh"

#include <map>
#include <string>

namespace fusedopt {
namespace {

using Kernel = void (*)(const void* argument);

template <class Rule, class T>
void run_step(const void* argument) {
  __shared__ typename Step<Rule, T>::Shared shared;
  emulated::forget(&shared, sizeof shared);
  step<Rule, T>(*static_cast<const StepArguments*>(argument), shared);
}

void run_squares(const void* argument) { square_sums(*static_cast<const NormArguments*>(argument)); }
void run_sums(const void* argument) { sums_of_sums(*static_cast<const SumArguments*>(argument)); }

struct Known {
  Kernel run;
  size_t bytes;  // of its argument
};

#define FUSEDOPT_KNOWN(RULE)                                                     \
  {std::string(#RULE) + "_float", {run_step<RULE, float>, sizeof(StepArguments)}}, \
      {std::string(#RULE) + "_double", {run_step<RULE, double>, sizeof(StepArguments)}},

std::map<std::string, Known> known = {FUSEDOPT_RULES(FUSEDOPT_KNOWN){"squares", {run_squares, sizeof(NormArguments)}},
                                      {"sums", {run_sums, sizeof(SumArguments)}}};

enum { success = 0, invalid_value = 1, not_found = 500, no_context = 201 };
int depth = 0;
long long launched = 0;

}  // namespace
}  // namespace fusedopt

using namespace fusedopt;

extern "C" {

// Launches so far, and reads of 16 bytes in them.
long long emulated_launches() { return launched; }
long long emulated_wide_reads() { return emulated::wide_reads; }

int cuInit(unsigned) { return success; }
int cuDriverGetVersion(int* version) { return *version = 13000, success; }
int cuGetErrorString(int error, const char** said) {
  *said = error == not_found    ? "named symbol not found"
          : error == no_context ? "invalid device context"
                                : "invalid argument";
  return success;
}
int cuDeviceGet(int* handle, int number) { return *handle = number, number == 0 ? success : invalid_value; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, success; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &depth, success; }
int cuCtxGetCurrent(void** context) { return *context = depth ? &depth : nullptr, success; }
int cuCtxPushCurrent_v2(void*) { return ++depth, success; }
int cuCtxPopCurrent_v2(void**) { return --depth, success; }
int cuModuleLoadData(void** module, const void*) { return *module = &known, depth ? success : no_context; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  const auto found = known.find(name);
  if (found == known.end()) return not_found;
  *function = &found->second;
  return success;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** arguments, void** extra) {
  if (!depth) return no_context;
  if (!x || x > 0x7fffffffu || y != 1 || z != 1 || shared || extra) return invalid_value;
  const Known& kernel = *static_cast<const Known*>(function);
  if (kernel.bytes > 32764) return invalid_value;
  // A copy, as the driver makes one, and no more than the kernel declares.
  static char copy[32764] __attribute__((aligned(64)));
  std::memcpy(copy, arguments[0], kernel.bytes);
  const std::function<void()> body = [&] { kernel.run(copy); };
  emulated::kernel = &body;
  ++launched;
  for (unsigned number = 0; number < x; ++number) emulated::run_block(number, threads);
  return success;
}
}
