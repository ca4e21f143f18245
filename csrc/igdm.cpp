// igdm: the CPU ops and the autograd node. Schemas and formulas: ltat_fast/ops/igdm.py. CUDA: igdm_cuda.cpp.
#include "igdm.h"

#include "autograd.h"

namespace ltat {
namespace {

Tensor igdm_cpu(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction) {
  const Reduction reduce_to = reduction_of(reduction);
  IgdmCall call(student_plus, student_minus, teacher_plus, teacher_minus, divergence);
  const Tensor loss = call.new_loss({call.args.rows});
  call.args.loss = loss.mutable_data_ptr();
  const auto kernel = LTAT_KERNEL(igdm_forward);
  parallel(call.args.rows, row_grain(call.args.classes),
           [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return reduce(loss, reduce_to);
}

std::tuple<Tensor, Tensor> igdm_backward_cpu(const Tensor& grad_loss, const Tensor& student_plus,
                                             const Tensor& student_minus, const Tensor& teacher_plus,
                                             const Tensor& teacher_minus, std::string_view divergence,
                                             std::string_view reduction) {
  IgdmCall call(student_plus, student_minus, teacher_plus, teacher_minus, divergence);
  const Tensor grad = grad_loss.to(work_type(student_plus));
  const Tensor grad_plus = call.new_logits(), grad_minus = call.new_logits();
  call.args.grad_loss = grad_of(grad, call.args.rows, reduction_of(reduction));
  call.args.grad_plus = grad_plus.mutable_data_ptr();
  call.args.grad_minus = grad_minus.mutable_data_ptr();
  const auto kernel = LTAT_KERNEL(igdm_backward);
  parallel(call.args.rows, row_grain(call.args.classes),
           [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return {grad_plus, grad_minus};
}

struct IgdmNode : torch::autograd::Function<IgdmNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& student_plus, const Tensor& student_minus,
                        const Tensor& teacher_plus, const Tensor& teacher_minus, std::string_view divergence,
                        std::string_view reduction) {
    static const auto op = find_op("ltat::igdm", &igdm_cpu);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({student_plus, student_minus, teacher_plus, teacher_minus});
    ctx->saved_data["divergence"] = std::string(divergence);
    ctx->saved_data["reduction"] = std::string(reduction);
    return op.call(student_plus, student_minus, teacher_plus, teacher_minus, divergence, reduction);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op("ltat::igdm_backward", &igdm_backward_cpu);
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(6);
    const std::string_view divergence = ctx->saved_data["divergence"].toStringView();
    const std::string_view reduction = ctx->saved_data["reduction"].toStringView();
    std::tie(result[0], result[1]) =
        call_backward(op, grads[0], saved[0], saved[1], saved[2], saved[3], divergence, reduction);
    return result;
  }
};

Tensor igdm_autograd(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                     const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction) {
  return IgdmNode::apply(student_plus, student_minus, teacher_plus, teacher_minus, divergence, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("igdm", igdm_cpu);
  m.impl("igdm_backward", igdm_backward_cpu);
}

LTAT_PYTHON(m) {
  m.def("igdm_cpu", igdm_cpu, NoGil());
  m.def("igdm_backward_cpu", igdm_backward_cpu, NoGil());
  m.def("igdm_autograd", igdm_autograd, NoGil());
}

}  // namespace ltat
