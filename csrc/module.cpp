// The Python module ltat_fast._C: build_info(), and the kernels by name for ltat_fast/ops (which checks arguments).
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/csrc/utils/pybind.h>

#include "common.h"
#include "ops.h"

#if defined(__clang__)
#define LTAT_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define LTAT_COMPILER "gcc " __VERSION__
#else
#define LTAT_COMPILER "unknown"
#endif

// ltat_fast/_ext.py reads this out of the file before loading it: a library built against another torch may crash the
// process at load, where no exception handler helps.
[[gnu::used]] extern const char ltat_build_stamp[] =
    "ltat-fast-build:schema=" LTAT_SCHEMA_VERSION ";torch=" LTAT_TORCH_VERSION ";";

namespace ltat {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if LTAT_MULTIVERSION
    const std::string torch_uses = at::get_cpu_capability();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (torch_uses == "AVX512" && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512::table;
    }
    if (torch_uses != "DEFAULT" && fma) return avx2::table;
#endif
    return baseline::table;
  }();
  return chosen;
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["schema_version"] = LTAT_SCHEMA_VERSION;
  info["torch"] = LTAT_TORCH_VERSION;
  info["compiler"] = LTAT_COMPILER;
  info["cpu_builds"] = LTAT_MULTIVERSION ? "baseline avx2 avx512" : "baseline";
  info["cpu_isa"] = kernels().isa;
  info["threads"] = at::get_num_threads();
#ifdef LTAT_CUDA
  info["cuda"] = LTAT_CUDA;
  info["cuda_archs"] = LTAT_CUDA_ARCHS;
#else
  info["cuda"] = pybind11::none();
  info["cuda_archs"] = "";
#endif
  return info;
}

}  // namespace
}  // namespace ltat

PYBIND11_MODULE(_C, m) {
  using namespace ltat;
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("build_info", build_info);
  m.def("pgd_init", pgd_init_cpu, no_gil);
  m.def("pgd_step", pgd_step_cpu, no_gil);
  m.def("pgd_step_out", pgd_step_out_cpu, no_gil);
  m.def("balanced_softmax_kl", balanced_softmax_kl_cpu, no_gil);
  m.def("balanced_softmax_kl_backward", balanced_softmax_kl_backward_cpu, no_gil);
  m.def("igdm", igdm_cpu, no_gil);
  m.def("igdm_backward", igdm_backward_cpu, no_gil);
  m.def("balanced_softmax_kl_autograd", balanced_softmax_kl_autograd, no_gil);
  m.def("igdm_autograd", igdm_autograd, no_gil);
#ifdef LTAT_CUDA
  m.def("igdm_cuda", igdm_cuda, no_gil);
  m.def("igdm_backward_cuda", igdm_backward_cuda, no_gil);
#endif
}
