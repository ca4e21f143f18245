// What the kernels take, on the CPU and on CUDA: plain pointers and numbers, no torch header.
#pragma once

#include <cstdint>

namespace ltat {

enum class Dtype { f32, bf16, f16, f64 };
enum class Noise { uniform, gaussian };
enum class Divergence { kl, l1, l2 };

// What reaches row i from above: scale * data[i * stride]. Stride 0 and scale 1 / B are "mean".
struct GradLoss {
  const void* data;
  int64_t stride;
  double scale;
};

struct PgdStep {
  const void *x_adv, *grad, *x;
  void* out;  // may be x_adv
  double step_size, eps, lower, upper;
  Dtype dtype, grad_dtype;
};

struct PgdInit {
  const void* x;
  void* out;  // may be x
  int64_t numel;
  uint64_t seed;
  double eps, std, lower, upper;
  Noise noise;
  Dtype dtype;
};

struct BalancedSoftmaxKl {
  const void *logits, *teacher;  // (B, C), unit column stride; teacher may be null
  const int64_t* labels;         // (B,), each in [0, C): checked by the caller
  const void* log_prior;         // (C,)
  void* stats;                   // (2 or 6, B): max and log-sum of the balanced, student and teacher softmax
  void* loss;                    // (B,), forward
  GradLoss grad_loss;            // backward
  void* grad_logits;             // (B, C) contiguous, backward
  int64_t rows, classes, logits_stride, teacher_stride;
  double kl_weight, temperature;
  Dtype dtype;
};

struct Igdm {
  const void *student_plus, *student_minus, *teacher_plus, *teacher_minus;  // (B, C) contiguous
  void* loss;                                                               // (B,), forward
  GradLoss grad_loss;                                                       // backward
  void *grad_plus, *grad_minus;                                             // (B, C) contiguous, backward
  int64_t rows, classes;
  Divergence divergence;
  Dtype dtype;
};

}  // namespace ltat
