// The C++ functions behind the schemas: registered with the dispatcher (<op>.cpp) and, for eager calls that need none
// of its services, bound directly (module.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

// Raised with any change to a schema or to a kernel's arguments: ltat_fast/_ext.py refuses a library with another one.
#define LTAT_SCHEMA_VERSION "1"

namespace ltat {

using at::Tensor;

Tensor pgd_init_cpu(const Tensor& x, const Tensor& seed, double eps, double std, double lower, double upper,
                    std::string_view noise);
Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper);
void pgd_step_out_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                      double lower, double upper, const Tensor& out);

std::tuple<Tensor, Tensor> balanced_softmax_kl_cpu(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& class_counts,
                                                   const std::optional<Tensor>& teacher_logits, double tau,
                                                   double kl_weight, double temperature, std::string_view reduction);
Tensor balanced_softmax_kl_backward_cpu(const Tensor& grad_loss, const Tensor& logits, const Tensor& labels,
                                        const Tensor& class_counts, const std::optional<Tensor>& teacher_logits,
                                        const Tensor& stats, double tau, double kl_weight, double temperature,
                                        std::string_view reduction);

Tensor igdm_cpu(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction);
std::tuple<Tensor, Tensor> igdm_backward_cpu(const Tensor& grad_loss, const Tensor& student_plus,
                                             const Tensor& student_minus, const Tensor& teacher_plus,
                                             const Tensor& teacher_minus, std::string_view divergence,
                                             std::string_view reduction);

// The same with gradients, on any device (autograd.cpp).
std::tuple<Tensor, Tensor> balanced_softmax_kl_autograd(const Tensor& logits, const Tensor& labels,
                                                        const Tensor& class_counts,
                                                        const std::optional<Tensor>& teacher_logits, double tau,
                                                        double kl_weight, double temperature,
                                                        std::string_view reduction);
Tensor igdm_autograd(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                     const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction);

#ifdef LTAT_CUDA
Tensor igdm_cuda(const Tensor& student_plus, const Tensor& student_minus, const Tensor& teacher_plus,
                 const Tensor& teacher_minus, std::string_view divergence, std::string_view reduction);
std::tuple<Tensor, Tensor> igdm_backward_cuda(const Tensor& grad_loss, const Tensor& student_plus,
                                              const Tensor& student_minus, const Tensor& teacher_plus,
                                              const Tensor& teacher_minus, std::string_view divergence,
                                              std::string_view reduction);
#endif

}  // namespace ltat
