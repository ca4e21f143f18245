// igdm: the CUDA ops, which launch the kernels of cuda/igdm.cu. The forward needs two launches (one for the reduction
// "none"), the backward one.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/igdm.h"
#include "igdm.h"

namespace ltat {
namespace {

Tensor igdm_cuda(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                 const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction) {
  const Reduction reduce_to = reduction_of(reduction);
  const c10::cuda::CUDAGuard device(student_plus.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  IgdmCall call(student_plus, student_minus, teacher_plus, teacher_minus, divergence);
  const Tensor rows = call.new_loss({call.args.rows});
  call.args.loss = rows.mutable_data_ptr();
  C10_CUDA_CHECK(igdm_forward_rows_cuda(call.args, stream));
  if (reduce_to == Reduction::none) return rows;
  const Tensor loss = call.new_loss({});
  const float scale = reduce_to == Reduction::mean ? 1.f / call.args.rows : 1.f;  // no rows: 0 * inf, the mean is NaN
  C10_CUDA_CHECK(
      sum_rows_cuda(rows.const_data_ptr<float>(), call.args.rows, scale, loss.mutable_data_ptr<float>(), stream));
  return loss;
}

std::tuple<Tensor, Tensor> igdm_backward_cuda(const Tensor& grad_loss, const Tensor& student_plus,
                                              const Tensor& student_minus, const Tensor& teacher_plus,
                                              const Tensor& teacher_minus, std::string_view divergence,
                                              std::string_view reduction) {
  const c10::cuda::CUDAGuard device(student_plus.device());
  IgdmCall call(student_plus, student_minus, teacher_plus, teacher_minus, divergence);
  TORCH_CHECK_VALUE(grad_loss.device() == student_plus.device(), "grad_loss must be on the device of the logits, ",
                    student_plus.device(), ", got ", grad_loss.device());
  const Tensor grad = grad_loss.to(at::kFloat), grad_plus = call.new_logits(), grad_minus = call.new_logits();
  call.args.grad_loss = grad_of(grad, call.args.rows, reduction_of(reduction));
  call.args.grad_plus = grad_plus.mutable_data_ptr();
  call.args.grad_minus = grad_minus.mutable_data_ptr();
  C10_CUDA_CHECK(igdm_backward_rows_cuda(call.args, c10::cuda::getCurrentCUDAStream()));
  return {grad_plus, grad_minus};
}

}  // namespace

TORCH_LIBRARY_IMPL(ltat, CUDA, m) {
  m.impl("igdm", igdm_cuda);
  m.impl("igdm_backward", igdm_backward_cuda);
}

LTAT_PYTHON(m) {
  m.def("igdm_cuda", igdm_cuda, NoGil());
  m.def("igdm_backward_cuda", igdm_backward_cuda, NoGil());
}

}  // namespace ltat
