// Shared by igdm.cpp and igdm_cuda.cpp: argument checks, and the arguments of the kernels.
#pragma once

#include "common.h"
#include "cpu/igdm.h"

namespace ltat {

inline Divergence divergence_of(std::string_view name) {
  if (name == "kl") return Divergence::kl;
  if (name == "l1") return Divergence::l1;
  TORCH_CHECK_VALUE(name == "l2", "divergence must be 'kl', 'l1' or 'l2', got '", std::string(name), "'");
  return Divergence::l2;
}

struct IgdmCall {
  Tensor student_plus, student_minus, teacher_plus, teacher_minus;  // own the memory that args points to
  Igdm args{};

  IgdmCall(const Tensor& sp, const Tensor& sm, const Tensor& tp, const Tensor& tm, std::string_view divergence)
      : student_plus(sp.contiguous()), student_minus(sm.contiguous()), teacher_plus(tp.contiguous()),
        teacher_minus(tm.contiguous()) {
    TORCH_CHECK_VALUE(sp.dim() == 2, "student_plus must have shape (B, C), got ", sp.sizes());
    for (const Tensor* t : {&student_minus, &teacher_plus, &teacher_minus}) {
      TORCH_CHECK_VALUE(t->sizes() == sp.sizes(), "the logits must have the same shape, got ", t->sizes(), " and ",
                        sp.sizes());
      TORCH_CHECK_VALUE(t->device() == sp.device(), "the logits must be on the same device, got ", t->device(),
                        " and ", sp.device());
      TORCH_CHECK_TYPE(t->scalar_type() == sp.scalar_type(), "the logits must have the same dtype, got ",
                       t->scalar_type(), " and ", sp.scalar_type());
    }
    args.student_plus = student_plus.const_data_ptr();
    args.student_minus = student_minus.const_data_ptr();
    args.teacher_plus = teacher_plus.const_data_ptr();
    args.teacher_minus = teacher_minus.const_data_ptr();
    args.rows = sp.size(0);
    args.classes = sp.size(1);
    args.divergence = divergence_of(divergence);
    args.dtype = dtype_of(sp);
  }

  Tensor new_logits() const { return at::empty(student_plus.sizes(), student_plus.options()); }
  Tensor new_loss(at::IntArrayRef shape) const {
    return at::empty(shape, student_plus.options().dtype(work_type(student_plus)));
  }
};

}  // namespace ltat
