// pgd_init and pgd_step: schemas, and the CPU kernels behind them.
#include "ops.h"

#include "common.h"

namespace ltat {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {  // where it matters: a dimension of one element has no stride
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

}  // namespace

Tensor pgd_init_cpu(const Tensor& x, const Tensor& seed, double eps, double std, double lower, double upper,
                    std::string_view noise) {
  TORCH_CHECK_VALUE(seed.is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be one int64");
  TORCH_CHECK_VALUE(noise == "uniform" || noise == "gaussian", "noise must be 'uniform' or 'gaussian'");
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
  parallel(quads, kExpGrain / 4, [&](int64_t begin, int64_t end) { kernels().pgd_init(args, begin, end); });
  return out;
}

void pgd_step_out_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                      double lower, double upper, const Tensor& out) {
  check_same_shape(out, x_adv, "x_adv");
  check_same_shape(out, grad, "grad");
  check_same_shape(out, x, "x");
  TORCH_CHECK_TYPE(x_adv.scalar_type() == out.scalar_type() && x.scalar_type() == out.scalar_type(),
                   "x_adv, x and out must have one dtype");
  if (!out.is_non_overlapping_and_dense()) {  // a slice: no memory order to walk
    out.copy_(pgd_step_cpu(x_adv, grad, x, step_size, eps, lower, upper));
    return;
  }
  const Tensor from = in_layout_of(x_adv, out), slope = in_layout_of(grad, out), centre = in_layout_of(x, out);
  const PgdStep args{from.const_data_ptr(), slope.const_data_ptr(), centre.const_data_ptr(), out.mutable_data_ptr(),
                     step_size,             eps,                    lower,                   upper,
                     dtype_of(out),         dtype_of(grad)};
  parallel(out.numel(), kElementGrain, [&](int64_t begin, int64_t end) { kernels().pgd_step(args, begin, end); });
}

Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper) {
  const Tensor out = at::empty_like(x_adv);
  pgd_step_out_cpu(x_adv, grad, x, step_size, eps, lower, upper, out);
  return out;
}

TORCH_LIBRARY_FRAGMENT(ltat, m) {
  m.def("pgd_init(Tensor x, Tensor seed, float eps, float std, float lower, float upper, str noise) -> Tensor");
  m.def(
      "pgd_step(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, float lower, float upper) -> Tensor");
  m.def(
      "pgd_step_out(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, float lower, float upper, "
      "Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("pgd_init", pgd_init_cpu);
  m.impl("pgd_step", pgd_step_cpu);
  m.impl("pgd_step_out", pgd_step_out_cpu);
}

}  // namespace ltat
