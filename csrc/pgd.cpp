// pgd_init and pgd_step on the CPU. Schemas and formulas: ltat_fast/ops/pgd.py.
#include "cpu/pgd.h"

#include "common.h"

namespace ltat {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {  // ignores dimensions of one element: their stride has no effect
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_strides(t, like)) return t;
  return at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
}

void check_same_shape(const Tensor& a, const Tensor& b, const char* name) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), name, " has shape ", b.sizes(), ", expected ", a.sizes());
  TORCH_CHECK_VALUE(b.is_cpu(), name, " is on ", b.device(), ", expected cpu");
}

Tensor pgd_init_cpu(const Tensor& x, const Tensor& seed, double eps, double std, double lower, double upper,
                    std::string_view noise) {
  TORCH_CHECK_VALUE(seed.is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1,
                    "seed must be one int64 on the CPU");
  TORCH_CHECK_VALUE(noise == "uniform" || noise == "gaussian", "noise must be 'uniform' or 'gaussian', got '",
                    std::string(noise), "'");
  const Tensor out = at::empty_like(x), source = in_layout_of(x, out);
  const PgdInit args{source.const_data_ptr(),
                     out.mutable_data_ptr(),
                     x.numel(),
                     static_cast<uint64_t>(seed.item<int64_t>()),
                     eps,
                     std,
                     lower,
                     upper,
                     noise == "uniform" ? Noise::uniform : Noise::gaussian,
                     dtype_of(x)};
  const int64_t quads = (args.numel + 3) / 4;
  const auto kernel = LTAT_KERNEL(pgd_init);
  parallel(quads, kExpGrain / 4, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper);

void pgd_step_out_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                      double lower, double upper, const Tensor& out) {
  check_same_shape(out, x_adv, "x_adv");
  check_same_shape(out, grad, "grad");
  check_same_shape(out, x, "x");
  TORCH_CHECK_TYPE(x_adv.scalar_type() == out.scalar_type() && x.scalar_type() == out.scalar_type(),
                   "x_adv, x and out must have the same dtype, got ", x_adv.scalar_type(), ", ", x.scalar_type(),
                   " and ", out.scalar_type());
  if (!out.is_non_overlapping_and_dense()) {  // such as a slice: the loop needs dense memory
    out.copy_(pgd_step_cpu(x_adv, grad, x, step_size, eps, lower, upper));
    return;
  }
  const Tensor from = in_layout_of(x_adv, out), slope = in_layout_of(grad, out), centre = in_layout_of(x, out);
  const PgdStep args{from.const_data_ptr(), slope.const_data_ptr(), centre.const_data_ptr(), out.mutable_data_ptr(),
                     step_size,             eps,                    lower,                   upper,
                     dtype_of(out),         dtype_of(grad)};
  const auto kernel = LTAT_KERNEL(pgd_step);
  parallel(out.numel(), kElementGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper) {
  const Tensor out = at::empty_like(x_adv);
  pgd_step_out_cpu(x_adv, grad, x, step_size, eps, lower, upper, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("pgd_init", pgd_init_cpu);
  m.impl("pgd_step", pgd_step_cpu);
  m.impl("pgd_step_out", pgd_step_out_cpu);
}

LTAT_PYTHON(m) {
  m.def("pgd_init_cpu", pgd_init_cpu, NoGil());
  m.def("pgd_step_cpu", pgd_step_cpu, NoGil());
  m.def("pgd_step_out_cpu", pgd_step_out_cpu, NoGil());
}

}  // namespace ltat
