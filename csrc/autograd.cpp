// Autograd nodes of the loss ops for eager calls: what ltat_fast/ops registers from Python, at a fraction of its cost.
// The kernels are those of the tensors' device, through the dispatcher.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"

namespace ltat {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename F>
auto find(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// Calls `op` past autograd, unless the gradient is to be differentiated itself (create_graph): then the formula that
// ltat_fast/ops registered for it answers, with an error.
template <typename Op, typename... Args>
auto call_backward(const Op& op, const Args&... args) {
  if (at::GradMode::is_enabled()) return op.call(args...);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(args...);
}

struct BalancedSoftmaxKlNode : torch::autograd::Function<BalancedSoftmaxKlNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& labels,
                               const Tensor& class_counts, const std::optional<Tensor>& teacher_logits, double tau,
                               double kl_weight, double temperature, std::string_view reduction) {
    static const auto op = find("ltat::balanced_softmax_kl", &balanced_softmax_kl_cpu);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [loss, stats] =
        op.call(logits, labels, class_counts, teacher_logits, tau, kl_weight, temperature, reduction);
    ctx->save_for_backward({logits, labels, class_counts, teacher_logits.value_or(Tensor()), stats});
    ctx->saved_data["scalars"] = std::vector<double>{tau, kl_weight, temperature};
    ctx->saved_data["reduction"] = std::string(reduction);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find("ltat::balanced_softmax_kl_backward", &balanced_softmax_kl_backward_cpu);
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> teacher = saved[3].defined() ? std::optional(saved[3]) : std::nullopt;
    const std::vector<double> scalars = ctx->saved_data["scalars"].toDoubleVector();
    variable_list result(8);
    result[0] = call_backward(op, grads[0], saved[0], saved[1], saved[2], teacher, saved[4], scalars[0], scalars[1],
                              scalars[2], ctx->saved_data["reduction"].toStringView());
    return result;
  }
};

struct IgdmNode : torch::autograd::Function<IgdmNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student_plus, const Tensor& student_minus,
                        const Tensor& teacher_plus, const Tensor& teacher_minus, std::string_view divergence,
                        std::string_view reduction) {
    static const auto op = find("ltat::igdm", &igdm_cpu);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({student_plus, student_minus, teacher_plus, teacher_minus});
    ctx->saved_data["divergence"] = std::string(divergence);
    ctx->saved_data["reduction"] = std::string(reduction);
    return op.call(student_plus, student_minus, teacher_plus, teacher_minus, divergence, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find("ltat::igdm_backward", &igdm_backward_cpu);
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(6);
    const std::string_view divergence = ctx->saved_data["divergence"].toStringView();
    const std::string_view reduction = ctx->saved_data["reduction"].toStringView();
    std::tie(result[0], result[1]) =
        call_backward(op, grads[0], saved[0], saved[1], saved[2], saved[3], divergence, reduction);
    return result;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> balanced_softmax_kl_autograd(const Tensor& logits, const Tensor& labels,
                                                        const Tensor& class_counts,
                                                        const std::optional<Tensor>& teacher_logits, double tau,
                                                        double kl_weight, double temperature,
                                                        std::string_view reduction) {
  const variable_list out = BalancedSoftmaxKlNode::apply(logits, labels, class_counts, teacher_logits, tau, kl_weight,
                                                         temperature, reduction);
  return {out[0], out[1]};
}

Tensor igdm_autograd(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                     const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction) {
  return IgdmNode::apply(student_plus, student_minus, teacher_plus, teacher_minus, divergence, reduction);
}

}  // namespace ltat
