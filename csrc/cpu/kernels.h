// How the CPU kernels are found. The loops are built three times (baseline, AVX2, AVX-512; see table.h), without any
// torch header, and the build that runs is chosen once, at run time (module.cpp).
//
// Every kernel works on the half-open range [begin, end) of its own unit (elements, quads of elements, rows), gives the
// same result however the range is cut, computes in float32 (float64 for float64) and rounds once, on the store.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../args.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LTAT_MULTIVERSION 1
#else
#define LTAT_MULTIVERSION 0
#endif

namespace ltat {

struct Kernels {
  const char* isa;
  void (*pgd_step)(const PgdStep&, int64_t begin, int64_t end);  // elements
  void (*pgd_init)(const PgdInit&, int64_t begin, int64_t end);  // quads: four elements share one Philox block
  void (*balanced_softmax_kl_forward)(const BalancedSoftmaxKl&, int64_t begin, int64_t end);   // rows
  void (*balanced_softmax_kl_backward)(const BalancedSoftmaxKl&, int64_t begin, int64_t end);  // rows
  void (*igdm_forward)(const Igdm&, int64_t begin, int64_t end);                               // rows
  void (*igdm_backward)(const Igdm&, int64_t begin, int64_t end);                              // rows
};

namespace baseline { extern const Kernels table; }
#if LTAT_MULTIVERSION
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

}  // namespace ltat
