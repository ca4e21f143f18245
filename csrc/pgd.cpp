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

using MaybeTensor = std::optional<Tensor>;

// Strides are those along the images and along the channels, 0 where all have the same value.
Limit limit_of(const char* name, double number, const MaybeTensor& tensor, const Tensor& images) {
  if (!tensor) return {number, nullptr, {0, 0}};
  TORCH_CHECK_TYPE(tensor->scalar_type() == work_type(images), name, " must be ", work_type(images), ", got ",
                   tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->is_cpu(), name, " is on ", tensor->device(), ", expected cpu");
  Limit limit{0, tensor->const_data_ptr(), {0, 0}};
  bool fits = tensor->dim() <= 1 || tensor->dim() == images.dim();
  for (int64_t d = 0; fits && d < tensor->dim(); ++d) {
    if (tensor->size(d) == 1) continue;
    fits = d < 2 && d < images.dim() && tensor->size(d) == images.size(d);
    if (fits) limit.strides[d] = tensor->stride(d);
  }
  TORCH_CHECK_VALUE(fits, name, " has shape ", tensor->sizes(), ", which does not fit images of shape ",
                    images.sizes());
  return limit;
}

// `out` is dense: its strides say at which positions of memory the limits change.
Limits limits_of(const Tensor& out, Limit step_size, Limit eps, Limit lower, Limit upper) {
  Limits limits{step_size, eps, lower, upper, {}, {}};
  Limit* const all[] = {&limits.step_size, &limits.eps, &limits.lower, &limits.upper};
  const auto axis = [&](int64_t d) -> Axis {
    const auto differs = [&](const Limit* limit) { return limit->strides[d] != 0; };
    if (std::any_of(std::begin(all), std::end(all), differs)) return {out.stride(d), out.size(d)};
    return {INT64_MAX, 1};  // every position has index 0
  };
  limits.outer = axis(0), limits.inner = axis(1);
  if (limits.outer.stride < limits.inner.stride) {
    std::swap(limits.outer, limits.inner);
    for (Limit* limit : all) std::swap(limit->strides[0], limit->strides[1]);
  }
  return limits;
}

Tensor pgd_init_cpu(const Tensor& x, const Tensor& seed, double eps, double std, double lower, double upper,
                    std::string_view noise, const MaybeTensor& epsilons, const MaybeTensor& lowers,
                    const MaybeTensor& uppers) {
  TORCH_CHECK_VALUE(seed.is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1,
                    "seed must be one int64 on the CPU");
  TORCH_CHECK_VALUE(noise == "uniform" || noise == "gaussian", "noise must be 'uniform' or 'gaussian', got '",
                    std::string(noise), "'");
  const Tensor out = at::empty_like(x), source = in_layout_of(x, out);
  const Limit radius = limit_of("eps", eps, epsilons, x);
  const Limit scale = noise == "uniform" ? radius : Limit{std, nullptr, {0, 0}};
  const PgdInit args{source.const_data_ptr(),
                     out.mutable_data_ptr(),
                     x.numel(),
                     static_cast<uint64_t>(seed.item<int64_t>()),
                     limits_of(out, scale, radius, limit_of("lower", lower, lowers, x),
                               limit_of("upper", upper, uppers, x)),
                     noise == "uniform" ? Noise::uniform : Noise::gaussian,
                     dtype_of(x)};
  const int64_t quads = (args.numel + 3) / 4;
  const auto kernel = LTAT_KERNEL(pgd_init);
  parallel(quads, kExpGrain / 4, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper, const MaybeTensor& step_sizes, const MaybeTensor& epsilons,
                    const MaybeTensor& lowers, const MaybeTensor& uppers);

void pgd_step_out_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                      double lower, double upper, const Tensor& out, const MaybeTensor& step_sizes,
                      const MaybeTensor& epsilons, const MaybeTensor& lowers, const MaybeTensor& uppers) {
  check_same_shape(out, x_adv, "x_adv");
  check_same_shape(out, grad, "grad");
  check_same_shape(out, x, "x");
  TORCH_CHECK_TYPE(x_adv.scalar_type() == out.scalar_type() && x.scalar_type() == out.scalar_type(),
                   "x_adv, x and out must have the same dtype, got ", x_adv.scalar_type(), ", ", x.scalar_type(),
                   " and ", out.scalar_type());
  if (!out.is_non_overlapping_and_dense()) {  // such as a slice: the loop needs dense memory
    out.copy_(pgd_step_cpu(x_adv, grad, x, step_size, eps, lower, upper, step_sizes, epsilons, lowers, uppers));
    return;
  }
  const Tensor from = in_layout_of(x_adv, out), slope = in_layout_of(grad, out), centre = in_layout_of(x, out);
  const PgdStep args{from.const_data_ptr(),
                     slope.const_data_ptr(),
                     centre.const_data_ptr(),
                     out.mutable_data_ptr(),
                     limits_of(out, limit_of("step_size", step_size, step_sizes, out),
                               limit_of("eps", eps, epsilons, out), limit_of("lower", lower, lowers, out),
                               limit_of("upper", upper, uppers, out)),
                     dtype_of(out),
                     dtype_of(grad)};
  const auto kernel = LTAT_KERNEL(pgd_step);
  parallel(out.numel(), kElementGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor pgd_step_cpu(const Tensor& x_adv, const Tensor& grad, const Tensor& x, double step_size, double eps,
                    double lower, double upper, const MaybeTensor& step_sizes, const MaybeTensor& epsilons,
                    const MaybeTensor& lowers, const MaybeTensor& uppers) {
  const Tensor out = at::empty_like(x_adv);
  pgd_step_out_cpu(x_adv, grad, x, step_size, eps, lower, upper, out, step_sizes, epsilons, lowers, uppers);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ltat, CPU, m) {
  m.impl("pgd_init", pgd_init_cpu);
  m.impl("pgd_step", pgd_step_cpu);
  m.impl("pgd_step_out", pgd_step_out_cpu);
}

LTAT_PYTHON(m) {
  using namespace pybind11::literals;
  const pybind11::none none;  // so that a call with numbers may leave the tensors out
  m.def("pgd_init_cpu", pgd_init_cpu, NoGil(), "x"_a, "seed"_a, "eps"_a, "std"_a, "lower"_a, "upper"_a, "noise"_a,
        "epsilons"_a = none, "lowers"_a = none, "uppers"_a = none);
  m.def("pgd_step_cpu", pgd_step_cpu, NoGil(), "x_adv"_a, "grad"_a, "x"_a, "step_size"_a, "eps"_a, "lower"_a, "upper"_a,
        "step_sizes"_a = none, "epsilons"_a = none, "lowers"_a = none, "uppers"_a = none);
  m.def("pgd_step_out_cpu", pgd_step_out_cpu, NoGil(), "x_adv"_a, "grad"_a, "x"_a, "step_size"_a, "eps"_a, "lower"_a,
        "upper"_a, "out"_a, "step_sizes"_a = none, "epsilons"_a = none, "lowers"_a = none, "uppers"_a = none);
}

}  // namespace ltat
