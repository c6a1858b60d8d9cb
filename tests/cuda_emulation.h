// Runs csrc's kernels on the CPU, for tests without a GPU: included before each .cu by g++.
//
// Blocks run one after another and the threads of a block as coroutines, each up to its next
// barrier or shuffle: there all of them have arrived, as on a device. They take turns first to last
// or last to first, the other way round in the next block and the next launch, so that a value read
// before the barrier that orders it is missing in one of the two. Only what csrc uses is here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <memory>
#include <vector>

namespace emulated {

constexpr int kStack = 32 << 10;

struct Thread {
  ucontext_t entry;
  jmp_buf here;  // a switch by setjmp asks the kernel for nothing, 20 times faster than swapcontext
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 index{};
  bool started = false, done = false;
  double slot = 0;  // what it offers in a shuffle
};

struct Block {
  std::vector<Thread> threads;
  jmp_buf scheduler;
  Thread* current = nullptr;
  uint3 index{};
  unsigned launches = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
};

inline Block block;

inline void arrive() {
  if (_setjmp(block.current->here) == 0) _longjmp(block.scheduler, 1);
}

inline void run_thread() {
  block.body(block.argument);
  block.current->done = true;
  _longjmp(block.scheduler, 1);
}

inline void resume(Thread& thread) {
  block.current = &thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.entry);
}

template <typename T>
T shuffle_down(T x, int distance) {
  block.current->slot = x;
  arrive();
  const unsigned source = block.current->index.x + unsigned(distance);
  const bool inside = block.current->index.x % 32 + unsigned(distance) < 32;
  const T other = inside ? T(block.threads[source].slot) : x;
  arrive();
  return other;
}

template <typename Params>
struct Call {
  void (*kernel)(Params);
  const Params* params;
  static void run(const void* call) {
    const auto* self = static_cast<const Call*>(call);
    self->kernel(*self->params);
  }
};

template <typename Params>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  const Call<Params> call{kernel, &params};
  block.threads.resize(config->blockDim.x);
  block.body = Call<Params>::run;
  block.argument = &call;
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    block.index.x = b;
    for (unsigned i = 0; i < block.threads.size(); ++i) {
      Thread& thread = block.threads[i];
      thread.index.x = i;
      thread.started = thread.done = false;
      getcontext(&thread.entry);
      thread.entry.uc_stack.ss_sp = thread.stack.get();
      thread.entry.uc_stack.ss_size = kStack;
      makecontext(&thread.entry, run_thread, 0);
    }
    bool running = true;
    for (unsigned round = b + block.launches; running; ++round) {
      running = false;
      for (size_t i = 0; i < block.threads.size(); ++i) {
        Thread& thread = block.threads[round % 2 ? block.threads.size() - 1 - i : i];
        if (thread.done) continue;
        resume(thread);
        running = running || !thread.done;
      }
    }
  }
  ++block.launches;
  return cudaSuccess;
}

}  // namespace emulated

#define threadIdx (emulated::block.current->index)
#define blockIdx (emulated::block.index)
#define __syncthreads() emulated::arrive()
#define __shfl_down_sync(mask, x, distance) emulated::shuffle_down(x, distance)
#define cudaLaunchKernelEx emulated::launch
#define cudaGetErrorString(error) "an emulated launch failed"
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static
