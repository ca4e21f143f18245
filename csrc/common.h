// Helpers of every csrc/<op>.cpp: dtypes, threads, reductions, the CPU kernels and the binding to Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace ltat {

using at::Tensor;

// Adds functions of an op to the Python module ltat_fast._C. Use it like PYBIND11_MODULE, once per file:
//
//   LTAT_PYTHON(m) { m.def("igdm_cpu", igdm_cpu, NoGil()); }
//
// ltat_fast/ops/_operator.py finds them by name: <op>_cpu, <op>_cuda and <op>_autograd.
#define LTAT_PYTHON(m)                                                                       \
  static void bind_to_python(pybind11::module_& m);                                          \
  [[maybe_unused]] static const bool bound = (bindings().push_back(bind_to_python), true);   \
  static void bind_to_python(pybind11::module_& m)

std::vector<void (*)(pybind11::module_&)>& bindings();  // module.cpp

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

enum class Isa { baseline, avx2, avx512 };
Isa isa();  // the widest instruction set that this CPU and torch's ATEN_CPU_CAPABILITY allow; module.cpp

// The build of a CPU kernel for isa().
#if LTAT_MULTIVERSION
#define LTAT_KERNEL(name) \
  (isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define LTAT_KERNEL(name) baseline::name
#endif

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    case at::kDouble: return Dtype::f64;
    default: TORCH_CHECK_TYPE(false, "expected a floating-point tensor, got ", t.scalar_type());
  }
}

// The dtype of the arithmetic, the losses and the statistics.
inline at::ScalarType work_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f(begin, end) over [0, size) on torch's own threads. Linking OpenMP would add a second thread pool.
template <typename F>
void parallel(int64_t size, int64_t grain, const F& f) {
  if (size <= grain) return f(int64_t{0}, size);
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  TORCH_CHECK(torch_parallel_for(0, size, grain, call, const_cast<F*>(&f)) == 0, "torch_parallel_for failed");
}

constexpr int64_t kElementGrain = 32768;  // least number of elements per thread, for pointwise kernels
constexpr int64_t kExpGrain = 16384;      // the same for kernels with several exponentials per element
inline int64_t row_grain(int64_t classes) { return std::max<int64_t>(1, kExpGrain / std::max<int64_t>(1, classes)); }

enum class Reduction { none, mean, sum };

inline Reduction reduction_of(std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "mean") return Reduction::mean;
  TORCH_CHECK_VALUE(name == "sum", "reduction must be 'none', 'mean' or 'sum', got '", std::string(name), "'");
  return Reduction::sum;
}

// Sums in float64 and in order, so that the result does not depend on the number of threads.
template <typename W>
Tensor reduce_rows(const Tensor& rows, Reduction reduction) {
  const W* loss = rows.const_data_ptr<W>();
  double sum = 0;
  for (int64_t i = 0; i < rows.numel(); ++i) sum += loss[i];
  if (reduction == Reduction::mean) sum /= rows.numel();
  return at::full({}, sum, rows.options());
}

inline Tensor reduce(const Tensor& rows, Reduction reduction) {
  if (reduction == Reduction::none) return rows;
  return rows.scalar_type() == at::kDouble ? reduce_rows<double>(rows, reduction) : reduce_rows<float>(rows, reduction);
}

// `grad_loss` must have the dtype work_type(logits) and outlive the result.
inline GradLoss grad_of(const Tensor& grad_loss, int64_t rows, Reduction reduction) {
  if (reduction == Reduction::none) {
    TORCH_CHECK_VALUE(grad_loss.dim() == 1 && grad_loss.size(0) == rows, "grad_loss must have shape (", rows,
                      ",), got ", grad_loss.sizes());
    return {grad_loss.const_data_ptr(), grad_loss.stride(0), 1.0};
  }
  TORCH_CHECK_VALUE(grad_loss.numel() == 1, "grad_loss must have one element, got shape ", grad_loss.sizes());
  return {grad_loss.const_data_ptr(), 0, reduction == Reduction::mean ? 1.0 / rows : 1.0};
}

}  // namespace ltat
