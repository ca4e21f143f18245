// The part of CUDA that csrc/cuda/igdm.cu needs, emulated on a CPU. The threads of a block take turns; each runs up to
// its next barrier. All threads of a block that still run must reach barriers and shuffles in the same order.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 threadIdx(0), blockIdx(0), blockDim(0);

namespace emulation {
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<float> shuffled;
inline std::function<void()> kernel;

inline void run_thread() {
  kernel();
  threads[threadIdx.x].done = true;
}

inline void barrier() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

inline void launch(dim3 grid, dim3 block, std::function<void()> body) {
  kernel = std::move(body);
  blockDim = block;
  shuffled.assign(block.x, 0.f);
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    threads = std::vector<Thread>(block.x);
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, run_thread, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
        if (threads[threadIdx.x].done) continue;
        swapcontext(&scheduler, &threads[threadIdx.x].context);
        running = true;
      }
    }
  }
}
}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
  emulation::shuffled[threadIdx.x] = v;
  emulation::barrier();
  const float other = emulation::shuffled[threadIdx.x ^ mask];
  emulation::barrier();
  return other;
}

struct __nv_bfloat16 { uint16_t bits; };
using __half = _Float16;
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {static_cast<uint16_t>(f == f ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u)};
}
inline float __half2float(__half v) { return v; }
inline __half __float2half_rn(float f) { return static_cast<__half>(f); }
