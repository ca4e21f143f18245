// Types that the arguments of several kernels share, on the CPU and on CUDA. No torch header.
#pragma once

#include <cstdint>

namespace ltat {

enum class Dtype { f32, bf16, f16, f64 };

// Gradient of the loss of row i: scale * data[i * stride]. The reduction "mean" has stride 0 and scale 1 / B.
struct GradLoss {
  const void* data;
  int64_t stride;
  double scale;
};

}  // namespace ltat
