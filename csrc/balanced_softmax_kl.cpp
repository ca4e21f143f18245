// balanced_softmax_kl: schemas, and the CPU kernels behind them.
#include <vector>

#include "common.h"
#include "ops.h"

namespace ltat {
namespace {

Tensor unit_columns(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1 ? t : t.contiguous(); }

// tau * log n_c, with 0 * log 0 = 0: tau = 0 is plain cross-entropy
template <typename W>
std::vector<W> log_prior(const Tensor& class_counts, double tau) {
  const Tensor counts = class_counts.to(at::kDouble).contiguous();
  std::vector<W> prior(counts.numel(), W{0});
  const double* n = counts.const_data_ptr<double>();
  for (size_t c = 0; c < prior.size(); ++c) {
    TORCH_CHECK_VALUE(n[c] >= 0, "class_counts must not be negative, got ", n[c], " for class ", c);
    if (tau != 0) prior[c] = tau * std::log(n[c]);
  }
  return prior;
}

// Checks the arguments and calls run(args), which may read what args points to.
template <typename Run>
void with_args(const Tensor& logits, const Tensor& labels, const Tensor& class_counts,
               const std::optional<Tensor>& teacher_logits, const Tensor& stats, double tau, double kl_weight,
               double temperature, const Run& run) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == rows, "labels must have shape (", rows, ",)");
  TORCH_CHECK_VALUE(class_counts.numel() == classes, "class_counts must have shape (", classes, ",)");
  TORCH_CHECK_VALUE(labels.is_cpu() && class_counts.is_cpu() && stats.is_cpu(), "all tensors must be on the CPU");
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must be int64");
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be positive");
  TORCH_CHECK_VALUE(stats.is_contiguous() && stats.dim() == 2 && stats.size(0) == (teacher_logits ? 6 : 2) &&
                        stats.size(1) == rows && stats.scalar_type() == work_type(logits),
                    "stats must be what the forward returned");
  const Tensor y = labels.contiguous(), z = unit_columns(logits);
  const Tensor t = teacher_logits ? unit_columns(*teacher_logits) : z;
  TORCH_CHECK_VALUE(t.is_cpu() && t.sizes() == z.sizes(), "teacher_logits must have the shape of logits");
  TORCH_CHECK_TYPE(t.scalar_type() == z.scalar_type(), "logits and teacher_logits must have one dtype");
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = y.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(label >= 0 && label < classes, "label ", label, " of sample ", i, " is outside [0, ", classes,
                      ")");
  }
  BalancedSoftmaxKl args{};
  args.logits = z.const_data_ptr();
  args.teacher = teacher_logits ? t.const_data_ptr() : nullptr;
  args.labels = y.const_data_ptr<int64_t>();
  args.stats = stats.mutable_data_ptr();
  args.rows = rows;
  args.classes = classes;
  args.logits_stride = z.stride(0);
  args.teacher_stride = t.stride(0);
  args.kl_weight = kl_weight;
  args.temperature = temperature;
  args.dtype = dtype_of(z);
  const auto with_prior = [&](auto prior) {
    args.log_prior = prior.data();
    run(args);
  };
  args.dtype == Dtype::f64 ? with_prior(log_prior<double>(class_counts, tau))
                           : with_prior(log_prior<float>(class_counts, tau));
}

}  // namespace

std::tuple<Tensor, Tensor> balanced_softmax_kl_cpu(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& class_counts,
                                                   const std::optional<Tensor>& teacher_logits, double tau,
                                                   double kl_weight, double temperature, std::string_view reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (B, C), got ", logits.sizes());
  const Reduction reduce_to = reduction_of(reduction);
  const auto options = logits.options().dtype(work_type(logits));
  const int64_t rows = logits.size(0);
  const Tensor loss = at::empty({rows}, options), stats = at::empty({teacher_logits ? 6 : 2, rows}, options);
  with_args(logits, labels, class_counts, teacher_logits, stats, tau, kl_weight, temperature, [&](auto& args) {
    args.loss = loss.mutable_data_ptr();
    parallel(rows, row_grain(args.classes),
             [&](int64_t begin, int64_t end) { kernels().balanced_softmax_kl_forward(args, begin, end); });
  });
  return {reduce(loss, reduce_to), stats};
}

Tensor balanced_softmax_kl_backward_cpu(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                                        const Tensor& class_counts, const std::optional<Tensor>& teacher_logits,
                                        const Tensor& stats, double tau, double kl_weight, double temperature,
                                        std::string_view reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (B, C), got ", logits.sizes());
  const Tensor grad = grad_loss.to(work_type(logits));
  const Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  with_args(logits, labels, class_counts, teacher_logits, stats, tau, kl_weight, temperature, [&](auto& args) {
    args.grad_loss = grad_of(grad, args.rows, reduction_of(reduction));
    args.grad_logits = grad_logits.mutable_data_ptr();
    parallel(args.rows, row_grain(args.classes),
             [&](int64_t begin, int64_t end) { kernels().balanced_softmax_kl_backward(args, begin, end); });
  });
  return grad_logits;
}

TORCH_LIBRARY_FRAGMENT(ltat, m) {
  m.def(
      "balanced_softmax_kl(Tensor logits, Tensor labels, Tensor class_counts, Tensor? teacher_logits, float tau, "
      "float kl_weight, float temperature, str reduction) -> (Tensor, Tensor)");
  m.def(
      "balanced_softmax_kl_backward(Tensor grad_loss, Tensor logits, Tensor labels, Tensor class_counts, "
      "Tensor? teacher_logits, Tensor stats, float tau, float kl_weight, float temperature, str reduction) -> Tensor");
}

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("balanced_softmax_kl", balanced_softmax_kl_cpu);
  m.impl("balanced_softmax_kl_backward", balanced_softmax_kl_backward_cpu);
}

}  // namespace ltat
