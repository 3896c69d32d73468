#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// ThreadSanitizer cannot see the OpenMP runtime, which is not built with it, hand work to its threads and wait for them.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#define FUSEDOPT_TSAN(CALL, ADDRESS) __tsan_##CALL(ADDRESS)
#else
#define FUSEDOPT_TSAN(CALL, ADDRESS)
#endif

namespace fusedopt {
namespace {

// torch.set_flush_denormal reaches only the thread that calls it; without this a result would depend on the thread.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
  }
  ~DefaultFloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// GCC's OpenMP entry point, which LLVM's and Intel's runtimes export too. Looked up, not linked: linking would load a
// second runtime beside torch's whenever the two differ, and their threads would fight over the cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  const char* name = "none: no OpenMP runtime is loaded, so steps run on one thread";

  Runtime() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    if (find(RTLD_DEFAULT, "torch's OpenMP")) return;
    for (const char* library : {"libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"})
      if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD))
        if (find(handle, library)) return;
  }

  bool find(void* handle, const char* found) {
    parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
    if (parallel) name = found;
    return parallel != nullptr;
  }

  static std::atomic<bool> forked;
};
std::atomic<bool> Runtime::forked{false};

const Runtime& runtime() {
  static const Runtime instance;
  return instance;
}

struct Team {
  void (*task)(void*, int, int);
  void* context;
  int shares;
  std::atomic<int> next{0};
};

// Shares are taken, not assigned: the runtime may give fewer threads than asked for.
void work(void* data) {
  auto& team = *static_cast<Team*>(data);
  FUSEDOPT_TSAN(acquire, &team);
  const DefaultFloatMode mode;
  for (int share; (share = team.next.fetch_add(1)) < team.shares;) team.task(team.context, share, team.shares);
  FUSEDOPT_TSAN(release, &team);
}

}  // namespace

void parallel(int threads, int shares, void (*task)(void*, int, int), void* context) {
  const bool serial = threads <= 1 || !runtime().parallel || Runtime::forked;
  Team team{task, context, shares};
  FUSEDOPT_TSAN(release, &team);
  serial ? work(&team) : runtime().parallel(work, &team, unsigned(threads), 0);
  FUSEDOPT_TSAN(acquire, &team);
}

const char* thread_runtime() {
  return Runtime::forked ? "none: this is a forked process, so steps run on one thread" : runtime().name;
}

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, neon_kernels;
extern const MatmulKernel avx512_bf16_matmul;

const Kernels* const* available_kernels() {
  static const Kernels* available[4] = {};
  if (!available[0]) {
    int count = 0;
#if defined(__x86_64__)
    // Clang does not know "f16c"; every processor with AVX2 has it.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512) available[count++] = &avx512_kernels;
    if (avx2) available[count++] = &avx2_kernels;
    available[count] = &baseline_kernels;
#elif defined(__aarch64__)
    available[count] = &neon_kernels;
#else
    available[count] = &baseline_kernels;
#endif
  }
  return available;
}

MatmulKernel bfloat16_matmul() {
#if defined(FUSEDOPT_AVX512_BF16)
  const bool avx512 = available_kernels()[0] == &avx512_kernels;
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16_matmul;
#endif
  return nullptr;
}

}  // namespace fusedopt
