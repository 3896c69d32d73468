#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "../registry.h"
#include "arguments.h"
#include "kernels.h"

namespace fusedopt {
namespace {

// As cuda.h has them, which need not be there.
using Result = int;
using Context = struct ContextOf*;
using Module = struct ModuleOf*;
using Function = struct FunctionOf*;
using Stream = struct StreamOf*;
enum { capability_major = 75, capability_minor = 76 };

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("the CUDA kernels: " + what); }

struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuDriverGetVersion)(int*);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuDeviceGet)(int*, int);
  Result (*cuDeviceGetAttribute)(int*, int, int);
  Result (*cuDevicePrimaryCtxRetain)(Context*, int);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxPushCurrent_v2)(Context);
  Result (*cuCtxPopCurrent_v2)(Context*);
  Result (*cuModuleLoadData)(Module*, const void*);
  Result (*cuModuleGetFunction)(Function*, Module, const char*);
  Result (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream,
                           void**, void**);

  void check(Result result, const char* call) const {
    if (result == 0) return;
    const char* said = nullptr;
    cuGetErrorString(result, &said);
    fail(std::string(call) + ": " + (said ? said : "error " + std::to_string(result)));
  }
};

#define FUSEDOPT_CHECKED(DRIVER, CALL, ...) (DRIVER).check((DRIVER).CALL(__VA_ARGS__), #CALL)

Driver load_driver() {
  // A stand-in for tests, as FUSEDOPT_NATIVE_PATH is for this module.
  const char* given = std::getenv("FUSEDOPT_CUDA_DRIVER");
  const char* name = given && *given ? given : "libcuda.so.1";
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(std::string(dlerror()) + "; install NVIDIA's driver");
  Driver driver;
#define FUSEDOPT_FIND(FUNCTION)                                                                           \
  driver.FUNCTION = reinterpret_cast<decltype(driver.FUNCTION)>(dlsym(library, #FUNCTION));                 \
  if (!driver.FUNCTION) fail(std::string(name) + " has no " #FUNCTION "; install NVIDIA's driver of CUDA 12 or newer");
  FUSEDOPT_FIND(cuInit)
  FUSEDOPT_FIND(cuDriverGetVersion)
  FUSEDOPT_FIND(cuGetErrorString)
  FUSEDOPT_FIND(cuDeviceGet)
  FUSEDOPT_FIND(cuDeviceGetAttribute)
  FUSEDOPT_FIND(cuDevicePrimaryCtxRetain)
  FUSEDOPT_FIND(cuCtxGetCurrent)
  FUSEDOPT_FIND(cuCtxPushCurrent_v2)
  FUSEDOPT_FIND(cuCtxPopCurrent_v2)
  FUSEDOPT_FIND(cuModuleLoadData)
  FUSEDOPT_FIND(cuModuleGetFunction)
  FUSEDOPT_FIND(cuLaunchKernel)
  FUSEDOPT_CHECKED(driver, cuInit, 0);
  return driver;
}

// Tried anew after a failure.
const Driver& driver() {
  static const Driver loaded = load_driver();
  return loaded;
}

// Makes a device's primary context, which is torch's, current while it lives.
class Current {
 public:
  // What a stand-in runs on the CPU counts as on device 0.
  explicit Current(int device) : context_(context_of(std::max(device, 0))) {
    Context before = nullptr;
    FUSEDOPT_CHECKED(driver(), cuCtxGetCurrent, &before);
    pushed_ = before != context_;
    if (pushed_) FUSEDOPT_CHECKED(driver(), cuCtxPushCurrent_v2, context_);
  }
  ~Current() {
    if (pushed_) driver().cuCtxPopCurrent_v2(&context_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  // Never released: it lasts as long as torch's use of it.
  static Context context_of(int device) {
    static std::mutex mutex;
    static std::map<int, Context> known;
    const std::lock_guard<std::mutex> lock(mutex);
    Context& context = known[device];
    if (!context) {
      int handle = 0;
      FUSEDOPT_CHECKED(driver(), cuDeviceGet, &handle, device);
      FUSEDOPT_CHECKED(driver(), cuDevicePrimaryCtxRetain, &context, handle);
    }
    return context;
  }

  Context context_;
  bool pushed_;
};

// A kernel of an image, loaded on the device that is current. Modules are never unloaded.
Function function(int device, const CudaImage& image, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<int, const CudaImage*>, Module> modules;
  static std::map<std::pair<int, std::string>, Function> functions;
  const std::lock_guard<std::mutex> lock(mutex);
  Function& found = functions[{device, name}];
  if (!found) {
    Module& module = modules[{device, &image}];
    if (!module) FUSEDOPT_CHECKED(driver(), cuModuleLoadData, &module, image.begin);
    FUSEDOPT_CHECKED(driver(), cuModuleGetFunction, &found, module, name.c_str());
  }
  return found;
}

Function step_function(const LaunchForm& form) {
  if (form.rule < 0 || form.rule >= rule_count()) fail("there is no rule number " + std::to_string(form.rule));
  const std::string& name = rule_info(form.rule).name;
  if (find_rule(name) != form.rule)
    fail("rule '" + name + "' is a user's own, which has no CUDA kernel; backend=\"triton\" compiles one");
  const bool is_double = form.param == Storage::float64;
  return function(form.device, cuda_step_images[form.rule], name + (is_double ? "_double" : "_float"));
}

Function norm_function(int device, const char* name) { return function(device, cuda_norm_image, name); }

void launch(Function function, int64_t blocks, uint64_t stream, void* argument) {
  void* arguments[] = {argument};
  FUSEDOPT_CHECKED(driver(), cuLaunchKernel, function, unsigned(blocks), 1, 1, cuda_threads, 1, 1, 0,
                   reinterpret_cast<Stream>(stream), arguments, nullptr);
}

void check_room(size_t words, int room, const char* what) {
  if (words > size_t(room))
    fail(std::string(what) + " takes " + std::to_string(8 * words) + " bytes by value, and there is room for " +
         std::to_string(8 * room) + "; pass the address of a copy on the device");
}

static_assert(cuda_states == max_states && cuda_tile == tile_size, "as the tables have them");

int64_t trees_of(int64_t count) { return (count + tree_words - 1) / tree_words; }

}  // namespace

std::string cuda_unavailable(int device) {
  if (!*cuda_build.toolkit)
    return "the native module was built without CUDA kernels; install the CUDA toolkit and reinstall fusedopt with "
           "FUSEDOPT_CUDA=1 to see why they do not build";
  try {
    const Current current(device);
    int handle = 0, major = 0, minor = 0;
    FUSEDOPT_CHECKED(driver(), cuDeviceGet, &handle, device);
    FUSEDOPT_CHECKED(driver(), cuDeviceGetAttribute, &major, capability_major, handle);
    FUSEDOPT_CHECKED(driver(), cuDeviceGetAttribute, &minor, capability_minor, handle);
    if (major < 8)
      return "the GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
             ", older than Ampere's 8.0";
    try {
      norm_function(device, "squares");
    } catch (const std::runtime_error& error) {
      int version = 0;
      driver().cuDriverGetVersion(&version);
      return std::string(error.what()) + " (built by CUDA " + cuda_build.toolkit + " for architectures " +
             cuda_build.architectures + "; the GPU has " + std::to_string(10 * major + minor) +
             ", the driver CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
             "); update the driver, or reinstall fusedopt with FUSEDOPT_CUDA_ARCHITECTURES=" +
             std::to_string(10 * major + minor);
    }
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

int64_t cuda_argument_limit(int) { return 8 * int64_t(std::min(step_words, norm_words)); }

int64_t cuda_norm_sums(int64_t trees) {
  int64_t all = trees;
  while (trees > tree_words) all += trees = trees_of(trees);
  return all;
}

void cuda_prepare(const Launch& launch) {
  const Current current(launch.form.device);
  step_function(launch.form);
}

void cuda_prepare_norm(int device) {
  const Current current(device);
  norm_function(device, "squares");
  norm_function(device, "sums");
}

void cuda_step(const Launch& given, uint64_t stream, uint64_t control, uint64_t table, uint64_t scalars) {
  const LaunchForm& form = given.form;
  const int width = form.width();
  const int64_t rows = int64_t(given.table.size()) / width;
  if (!rows) return;
  const size_t table_words = table ? 0 : given.table.size(), scalar_words = scalars ? 0 : given.scalars.size();
  check_room(table_words + scalar_words, step_words, "the table with its scalars");
  // Uninitialised but for what the kernel reads: clearing it all would take longer than filling it.
  StepArguments arguments;
  StepHead& head = arguments.head;
  head = {};
  head.control = control;
  head.table = table;
  head.scalars = scalars;
  head.rows = int32_t(rows);
  head.width = width;
  head.dims = form.dims;
  head.scalar_words = int32_t(table_words);
  const auto set = [&](int operand, Storage storage) {
    head.storage[operand] = storage;
    head.element_size[operand] = uint8_t(element_size(storage));
  };
  set(param_operand, form.param);
  set(grad_operand, form.grad);
  if (form.has_master) set(master_operand, form.master);
  for (int k = 0; k < form.states; ++k) set(first_state + k, form.state[k]);
  head.has_master = form.has_master;
  head.stochastic = form.stochastic;
  head.zero_grad = form.zero_grad;
  head.aligned = form.aligned && !form.dims;
  std::memcpy(arguments.words, given.table.data(), 8 * table_words);
  std::memcpy(arguments.words + table_words, given.scalars.data(), 8 * scalar_words);
  const int64_t* last = given.table.data() + (rows - 1) * width;
  const Current current(form.device);
  launch(step_function(form), last[3] + (last[0] + cuda_tile - 1) / cuda_tile, stream, &arguments);
}

void cuda_norm(const std::vector<NormLaunch>& launches, int device, uint64_t stream, uint64_t control_in,
               double max_norm, uint64_t sums, uint64_t tables, uint64_t control_out, uint64_t norm) {
  const Current current(device);
  constexpr int warps = cuda_threads / 32;
  int64_t count = 0;
  for (const NormLaunch& each : launches) {
    if (!each.trees) continue;
    check_room(tables ? 0 : each.table.size(), norm_words, "the table of gradients");
    NormArguments arguments;
    arguments.head = {control_in, tables, sums, each.trees, int32_t(each.table.size()) / norm_width, each.grad,
                      each.aligned};
    if (tables)
      tables += 8 * each.table.size();
    else
      std::memcpy(arguments.words, each.table.data(), 8 * each.table.size());
    launch(norm_function(device, "squares"), (each.trees + warps - 1) / warps, stream, &arguments);
    count += each.trees;
  }
  for (;; count = trees_of(count)) {
    const uint64_t next = count > tree_words ? sums + 4 * uint64_t(count) : 0;
    SumArguments arguments = {sums, next, count, control_in, control_out, norm, max_norm};
    launch(norm_function(device, "sums"), (trees_of(count) + warps - 1) / warps + !count, stream, &arguments);
    if (!next) return;
    sums = next;
  }
}

}  // namespace fusedopt
