// Indirect gradient matching on CUDA: one launch forward, one backward. Formulas: ltat_fast/ops/igdm.py.
//
// Up to 1024 classes one warp computes a row and keeps both logit differences in registers, so that each logit is read
// once. With more classes one block computes a row and reads it again in each pass, from the cache. Arithmetic is
// float32 and uses no atomics, so results do not change from run to run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "igdm.h"

namespace ltat {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 4, kBlockThreads = 512;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }

struct Max {
  static constexpr float identity = -INFINITY;
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  static constexpr float identity = 0.f;
  __device__ float operator()(float x, float y) const { return x + y; }
};

template <typename Op>
__device__ __forceinline__ float warp_reduce(float v, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

template <typename Op>
__device__ float block_reduce(float v, Op op) {  // every thread gets the result
  __shared__ float partial[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  v = warp_reduce(v, op);
  __syncthreads();  // all threads have read the partial results of the previous call
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_reduce(lane < blockDim.x / kWarp ? partial[lane] : Op::identity, op);
}

// T: element type. kPerThread: number of classes that a thread keeps in registers, with one warp per row; or 0 for one
// block per row, which reads the row in each pass.
template <typename T, int kPerThread, bool kBackward>
__global__ void __launch_bounds__(kPerThread ? kWarp * kWarpsPerBlock : kBlockThreads)
    igdm_rows(const Igdm args, float grad_scale) {
  constexpr bool kWarpRow = kPerThread > 0;
  const int64_t row = kWarpRow ? int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  if (row >= args.rows) return;  // only whole warps return, and no block-wide barrier follows
  const int thread = kWarpRow ? threadIdx.x % kWarp : threadIdx.x, stride = kWarpRow ? kWarp : blockDim.x;
  const int classes = args.classes;
  const int64_t first = row * args.classes;
  const auto difference = [&](const void* plus, const void* minus, int c) {
    return load(static_cast<const T*>(plus) + first + c) - load(static_cast<const T*>(minus) + first + c);
  };

  float kept_a[kWarpRow ? kPerThread : 1], kept_b[kWarpRow ? kPerThread : 1];
  if constexpr (kWarpRow) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int c = thread + j * kWarp;
      if (c >= classes) continue;
      kept_a[j] = difference(args.student_plus, args.student_minus, c);
      kept_b[j] = difference(args.teacher_plus, args.teacher_minus, c);
    }
  }
  const auto each_class = [&](auto visit) {  // visit(class, a, b)
    if constexpr (kWarpRow) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        if (thread + j * kWarp < classes) visit(thread + j * kWarp, kept_a[j], kept_b[j]);
      }
    } else {
      for (int c = thread; c < classes; c += stride) {
        visit(c, difference(args.student_plus, args.student_minus, c),
              difference(args.teacher_plus, args.teacher_minus, c));
      }
    }
  };
  const auto reduce = [&](float v, auto op) {
    if constexpr (kWarpRow) return warp_reduce(v, op);
    else return block_reduce(v, op);
  };

  float max_a = -INFINITY, max_b = -INFINITY, sum_a = 0.f, sum_b = 0.f, loss = 0.f;
  if (args.divergence == Divergence::kl) {
    each_class([&](int, float a, float b) {
      max_a = fmaxf(max_a, a);
      max_b = fmaxf(max_b, b);
    });
    max_a = reduce(max_a, Max{});
    max_b = reduce(max_b, Max{});
    each_class([&](int, float a, float b) {
      const float log_q = a - max_a, log_p = b - max_b, p = expf(log_p);
      sum_a += expf(log_q);
      sum_b += p;
      if constexpr (!kBackward) loss += p == 0.f ? 0.f : p * (log_p - log_q);  // 0 log 0 = 0, also where log_q is -inf
    });
    sum_a = reduce(sum_a, Sum{});
    sum_b = reduce(sum_b, Sum{});
  } else if constexpr (!kBackward) {
    const bool l1 = args.divergence == Divergence::l1;
    each_class([&](int, float a, float b) { loss += l1 ? fabsf(a - b) : (a - b) * (a - b); });
  }

  if constexpr (!kBackward) {
    loss = reduce(loss, Sum{});
    if (args.divergence == Divergence::kl) loss = loss / sum_b + (logf(sum_a) - logf(sum_b));
    if (thread == 0) static_cast<float*>(args.loss)[row] = loss;
  } else {
    const GradLoss& up = args.grad_loss;
    const float grad = static_cast<const float*>(up.data)[row * up.stride] * grad_scale;
    const float inv_a = 1.f / sum_a, inv_b = 1.f / sum_b;
    each_class([&](int c, float a, float b) {
      float d = 2.f * grad * (a - b);
      if (args.divergence == Divergence::kl) d = grad * (expf(a - max_a) * inv_a - expf(b - max_b) * inv_b);
      if (args.divergence == Divergence::l1) d = a > b ? grad : a < b ? -grad : 0.f;
      store(static_cast<T*>(args.grad_plus) + first + c, d);
      store(static_cast<T*>(args.grad_minus) + first + c, -d);
    });
  }
}

__global__ void __launch_bounds__(kBlockThreads) sum_rows(const float* row_losses, int64_t rows, float scale,
                                                          float* result) {
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += row_losses[i];
  sum = block_reduce(sum, Sum{});
  if (threadIdx.x == 0) *result = sum * scale;
}

template <typename T, bool kBackward>
void launch(const Igdm& args, cudaStream_t stream) {
  const float scale = args.grad_loss.scale;
  const dim3 warp_rows((args.rows + kWarpsPerBlock - 1) / kWarpsPerBlock), warps(kWarp * kWarpsPerBlock);
  if (args.classes <= 1 * kWarp) igdm_rows<T, 1, kBackward><<<warp_rows, warps, 0, stream>>>(args, scale);
  else if (args.classes <= 4 * kWarp) igdm_rows<T, 4, kBackward><<<warp_rows, warps, 0, stream>>>(args, scale);
  else if (args.classes <= 8 * kWarp) igdm_rows<T, 8, kBackward><<<warp_rows, warps, 0, stream>>>(args, scale);
  else if (args.classes <= 32 * kWarp) igdm_rows<T, 32, kBackward><<<warp_rows, warps, 0, stream>>>(args, scale);
  else igdm_rows<T, 0, kBackward><<<dim3(args.rows), dim3(kBlockThreads), 0, stream>>>(args, scale);
}

template <bool kBackward>
cudaError_t launch_any(const Igdm& args, cudaStream_t stream) {
  if (args.rows == 0 || args.classes == 0) return cudaSuccess;
  switch (args.dtype) {
    case Dtype::f32: launch<float, kBackward>(args, stream); break;
    case Dtype::bf16: launch<__nv_bfloat16, kBackward>(args, stream); break;
    case Dtype::f16: launch<__half, kBackward>(args, stream); break;
    case Dtype::f64: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t igdm_forward_rows_cuda(const Igdm& args, cudaStream_t stream) { return launch_any<false>(args, stream); }

cudaError_t igdm_backward_rows_cuda(const Igdm& args, cudaStream_t stream) { return launch_any<true>(args, stream); }

cudaError_t sum_rows_cuda(const float* row_losses, int64_t rows, float scale, float* result, cudaStream_t stream) {
  sum_rows<<<1, kBlockThreads, 0, stream>>>(row_losses, rows, scale, result);
  return cudaGetLastError();
}

}  // namespace ltat
