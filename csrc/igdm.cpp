// igdm: schemas, and the CPU kernels behind them (CUDA: cuda/igdm.cpp).
#include "igdm.h"

#include "ops.h"

namespace ltat {

Tensor igdm_cpu(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction) {
  const Reduction reduce_to = reduction_of(reduction);
  IgdmCall call(student_plus, student_minus, teacher_plus, teacher_minus, divergence);
  const Tensor loss = call.new_loss({call.args.rows});
  call.args.loss = loss.mutable_data_ptr();
  parallel(call.args.rows, row_grain(call.args.classes),
           [&](int64_t begin, int64_t end) { kernels().igdm_forward(call.args, begin, end); });
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
  parallel(call.args.rows, row_grain(call.args.classes),
           [&](int64_t begin, int64_t end) { kernels().igdm_backward(call.args, begin, end); });
  return {grad_plus, grad_minus};
}

TORCH_LIBRARY_FRAGMENT(ltat, m) {
  m.def(
      "igdm(Tensor student_plus, Tensor student_minus, Tensor teacher_plus, Tensor teacher_minus, str divergence, "
      "str reduction) -> Tensor");
  m.def(
      "igdm_backward(Tensor grad_loss, Tensor student_plus, Tensor student_minus, Tensor teacher_plus, "
      "Tensor teacher_minus, str divergence, str reduction) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("igdm", igdm_cpu);
  m.impl("igdm_backward", igdm_backward_cpu);
}

}  // namespace ltat
