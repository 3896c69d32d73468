// What CUDA's compiler provides, for kernels compiled as C++ of the host: a block's threads are fibers, which run one
// at a time from one barrier to the next.
//
// They run in order of their numbers, and in every second block in reverse: where a barrier is missing, one thread
// reads what another has not written yet, or writes over what another has not read.
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};

namespace emulated {

// Threads that meet: of a warp or of a block.
struct Barrier {
  int members = 0, arrived = 0;
  unsigned generation = 0;
  void release() {
    if (members && arrived == members) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned number = 0;
  bool done = false;
  const Barrier* waits = nullptr;
  unsigned generation = 0;
  std::vector<Copy> copies;  // made at the latest moment
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  uint64_t exchanged[1024];
};

inline ucontext_t scheduler;
inline Fiber* running;
inline Block* block;
inline const std::function<void()>* kernel;
inline long long wide_reads;  // of 16 bytes

inline void wait(Barrier& barrier) {
  ++barrier.arrived;
  const unsigned generation = barrier.generation;
  barrier.release();
  if (barrier.generation != generation) return;
  running->waits = &barrier;
  running->generation = generation;
  swapcontext(&running->context, &scheduler);
}

inline Barrier& warp() { return block->warps[running->number / 32]; }

inline void entry() {
  (*kernel)();
  running->done = true;
  for (Barrier* barrier : {&warp(), &block->all}) {
    --barrier->members;
    barrier->release();
  }
  swapcontext(&running->context, &scheduler);
}

// Shared memory, which holds nothing when a block begins.
inline bool fresh;
inline void forget(void* shared, size_t bytes) {
  if (fresh) memset(shared, 0xa5, bytes);
  fresh = false;
}

void run_block(unsigned number, unsigned threads);

}  // namespace emulated

inline Index threadIdx, blockIdx;

inline void emulated::run_block(unsigned number, unsigned threads) {
  static Block state;
  block = &state;
  state.warps.assign((threads + 31) / 32, {});
  state.all = {int(threads), 0, 0};
  blockIdx.x = number;
  fresh = true;
  if (state.fibers.size() < threads) state.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    auto& fiber = state.fibers[i];
    if (!fiber) fiber = std::make_unique<Fiber>();
    ++state.warps[i / 32].members;
    fiber->stack.resize(1 << 16);
    fiber->number = i;
    fiber->done = false;
    fiber->waits = nullptr;
    fiber->copies.clear();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, entry, 0);
  }
  for (unsigned left = threads; left;) {
    bool any = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *state.fibers[number % 2 ? threads - 1 - i : i];
      if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
      fiber.waits = nullptr;
      running = &fiber;
      threadIdx.x = fiber.number;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
      any = true;
    }
    if (!any) {
      std::fprintf(stderr, "emulated CUDA: threads wait for others that do not come\n");
      std::abort();
    }
  }
}

inline void __syncthreads() { emulated::wait(emulated::block->all); }
inline void __syncwarp() { emulated::wait(emulated::warp()); }

template <class T>
T emulated_exchange(T x, int lane) {
  static_assert(sizeof(T) <= 8, "one word");
  uint64_t* words = emulated::block->exchanged + emulated::running->number / 32 * 32;
  memcpy(words + emulated::running->number % 32, &x, sizeof x);
  __syncwarp();
  memcpy(&x, words + lane, sizeof x);
  return x;
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  x = emulated_exchange(x, int(emulated::running->number % 32) ^ mask);
  __syncwarp();
  return x;
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  for (int mask = 16; mask; mask /= 2) {
    const uint32_t other = __shfl_xor_sync(0, x, mask);
    x = x > other ? x : other;
  }
  return x;
}

template <class T>
T __ldg(const T* from) {
  emulated::wide_reads += sizeof(T) == 16;
  return *from;
}

inline bool __isGlobal(const void*) { return true; }
#define __builtin_assume(CONDITION) ((void)(CONDITION))
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "emulated CUDA: a copy of %zu bytes that is not aligned\n", bytes);
    std::abort();
  }
  emulated::running->copies.push_back({to, from, bytes});
  ++emulated::wide_reads;
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  for (const auto& copy : emulated::running->copies) memcpy(copy.to, copy.from, copy.bytes);
  emulated::running->copies.clear();
}
