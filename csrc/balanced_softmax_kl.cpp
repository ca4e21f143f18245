// balanced_softmax_kl: the CPU ops and the autograd node. Schemas and formulas: ltat_fast/ops/balanced_softmax_kl.py.
#include "cpu/balanced_softmax_kl.h"

#include "autograd.h"
#include "common.h"

namespace ltat {
namespace {

Tensor unit_columns(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1 ? t : t.contiguous(); }

// tau * log n_c, with 0 * log 0 = 0: tau = 0 is plain cross-entropy.
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

// Checks the arguments and calls run(args). The memory that args points to is valid only during that call.
template <typename Run>
void with_args(const Tensor& logits, const Tensor& labels, const Tensor& class_counts,
               const std::optional<Tensor>& teacher_logits, const Tensor& stats, double tau, double kl_weight,
               double temperature, double label_smoothing, const Run& run) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == rows, "labels must have shape (", rows, ",), got ",
                    labels.sizes());
  TORCH_CHECK_VALUE(class_counts.numel() == classes, "class_counts must have shape (", classes, ",), got ",
                    class_counts.sizes());
  TORCH_CHECK_VALUE(labels.is_cpu() && class_counts.is_cpu() && stats.is_cpu(), "all tensors must be on the CPU");
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must be int64, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be positive, got ", temperature);
  TORCH_CHECK_VALUE(0 <= label_smoothing && label_smoothing < 1, "label_smoothing must be in [0, 1), got ",
                    label_smoothing);
  TORCH_CHECK_VALUE(stats.is_contiguous() && stats.dim() == 2 && stats.size(0) == (teacher_logits ? 6 : 2) &&
                        stats.size(1) == rows && stats.scalar_type() == work_type(logits),
                    "stats must be the second result of the forward");
  const Tensor y = labels.contiguous(), z = unit_columns(logits);
  const Tensor t = teacher_logits ? unit_columns(*teacher_logits) : z;
  TORCH_CHECK_VALUE(t.is_cpu() && t.sizes() == z.sizes(), "teacher_logits must be on the CPU and have shape ",
                    z.sizes(), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == z.scalar_type(), "logits and teacher_logits must have the same dtype, got ",
                   z.scalar_type(), " and ", t.scalar_type());
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
  args.label_smoothing = label_smoothing;
  args.dtype = dtype_of(z);
  const auto with_prior = [&](auto prior) {
    args.log_prior = prior.data();
    args.smoothed_classes = std::count_if(prior.begin(), prior.end(), [](auto p) { return p > -INFINITY; });
    run(args);
  };
  args.dtype == Dtype::f64 ? with_prior(log_prior<double>(class_counts, tau))
                           : with_prior(log_prior<float>(class_counts, tau));
}

std::tuple<Tensor, Tensor> balanced_softmax_kl_cpu(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& class_counts,
                                                   const std::optional<Tensor>& teacher_logits, double tau,
                                                   double kl_weight, double temperature, double label_smoothing,
                                                   std::string_view reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (B, C), got ", logits.sizes());
  const Reduction reduce_to = reduction_of(reduction);
  const auto options = logits.options().dtype(work_type(logits));
  const int64_t rows = logits.size(0);
  const auto kernel = LTAT_KERNEL(balanced_softmax_kl_forward);
  const Tensor loss = at::empty({rows}, options), stats = at::empty({teacher_logits ? 6 : 2, rows}, options);
  const auto run = [&](auto& args) {
    args.loss = loss.mutable_data_ptr();
    parallel(rows, row_grain(args.classes), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  with_args(logits, labels, class_counts, teacher_logits, stats, tau, kl_weight, temperature, label_smoothing, run);
  return {reduce(loss, reduce_to), stats};
}

Tensor balanced_softmax_kl_backward_cpu(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                                        const Tensor& class_counts, const std::optional<Tensor>& teacher_logits,
                                        const Tensor& stats, double tau, double kl_weight, double temperature,
                                        double label_smoothing, std::string_view reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (B, C), got ", logits.sizes());
  const Tensor grad = grad_loss.to(work_type(logits));
  const Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  const auto kernel = LTAT_KERNEL(balanced_softmax_kl_backward);
  const auto run = [&](auto& args) {
    args.grad_loss = grad_of(grad, args.rows, reduction_of(reduction));
    args.grad_logits = grad_logits.mutable_data_ptr();
    parallel(args.rows, row_grain(args.classes), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  };
  with_args(logits, labels, class_counts, teacher_logits, stats, tau, kl_weight, temperature, label_smoothing, run);
  return grad_logits;
}

struct BalancedSoftmaxKlNode : torch::autograd::Function<BalancedSoftmaxKlNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& labels,
                               const Tensor& class_counts, const std::optional<Tensor>& teacher_logits, double tau,
                               double kl_weight, double temperature, double label_smoothing,
                               std::string_view reduction) {
    static const auto op = find_op("ltat::balanced_softmax_kl", &balanced_softmax_kl_cpu);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [loss, stats] =
        op.call(logits, labels, class_counts, teacher_logits, tau, kl_weight, temperature, label_smoothing, reduction);
    ctx->save_for_backward({logits, labels, class_counts, teacher_logits.value_or(Tensor()), stats});
    ctx->saved_data["scalars"] = std::vector<double>{tau, kl_weight, temperature, label_smoothing};
    ctx->saved_data["reduction"] = std::string(reduction);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op("ltat::balanced_softmax_kl_backward", &balanced_softmax_kl_backward_cpu);
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> teacher = saved[3].defined() ? std::optional(saved[3]) : std::nullopt;
    const std::vector<double> scalars = ctx->saved_data["scalars"].toDoubleVector();
    variable_list result(9);
    result[0] = call_backward(op, grads[0], saved[0], saved[1], saved[2], teacher, saved[4], scalars[0], scalars[1],
                              scalars[2], scalars[3], ctx->saved_data["reduction"].toStringView());
    return result;
  }
};

std::tuple<Tensor, Tensor> balanced_softmax_kl_autograd(const Tensor& logits, const Tensor& labels,
                                                        const Tensor& class_counts,
                                                        const std::optional<Tensor>& teacher_logits, double tau,
                                                        double kl_weight, double temperature, double label_smoothing,
                                                        std::string_view reduction) {
  const variable_list out = BalancedSoftmaxKlNode::apply(logits, labels, class_counts, teacher_logits, tau, kl_weight,
                                                         temperature, label_smoothing, reduction);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("balanced_softmax_kl", balanced_softmax_kl_cpu);
  m.impl("balanced_softmax_kl_backward", balanced_softmax_kl_backward_cpu);
}

LTAT_PYTHON(m) {
  m.def("balanced_softmax_kl_cpu", balanced_softmax_kl_cpu, NoGil());
  m.def("balanced_softmax_kl_backward_cpu", balanced_softmax_kl_backward_cpu, NoGil());
  m.def("balanced_softmax_kl_autograd", balanced_softmax_kl_autograd, NoGil());
}

}  // namespace ltat
