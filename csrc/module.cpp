// The Python module ltat_fast._C: build_info(), and the functions of the ops by name (LTAT_PYTHON in csrc/<op>.cpp).
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "common.h"

#if defined(__clang__)
#define LTAT_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define LTAT_COMPILER "gcc " __VERSION__
#else
#define LTAT_COMPILER "unknown"
#endif

// ltat_fast/_ext.py reads this from the file before it loads the library: a library built for another torch may crash
// the process while it loads, where no exception handler helps. setup.py defines both versions.
[[gnu::used]] extern const char ltat_build_stamp[] =
    "ltat-fast-build:schema=" LTAT_SCHEMA_VERSION ";torch=" LTAT_TORCH_VERSION ";";

namespace ltat {

std::vector<void (*)(pybind11::module_&)>& bindings() {
  static std::vector<void (*)(pybind11::module_&)> functions;
  return functions;
}

Isa isa() {
  static const Isa chosen = [] {
#if LTAT_MULTIVERSION
    const std::string torch_uses = at::get_cpu_capability();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (torch_uses == "AVX512" && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    if (torch_uses != "DEFAULT" && fma) return Isa::avx2;
#endif
    return Isa::baseline;
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
  info["cpu_isa"] = isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "baseline";
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
  m.def("build_info", ltat::build_info);
  for (const auto bind : ltat::bindings()) bind(m);
}
