// Declares CPU kernels. Each is compiled three times: for the baseline instruction set, AVX2 and AVX-512.
//
// A kernel works on the range [begin, end) of its own unit (elements, rows, ...). Its result does not depend on how the
// range is split between threads. It computes in float32 (float64 for float64) and rounds once, when it stores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../args.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LTAT_MULTIVERSION 1
#else
#define LTAT_MULTIVERSION 0
#endif

#define LTAT_DECLARE_IN(isa, name, Args) \
  namespace isa { void name(const Args& args, int64_t begin, int64_t end); }

// Declares name(const Args&, begin, end) in the namespace of each instruction set. Use inside namespace ltat.
// LTAT_KERNEL(name) of common.h is the build that this CPU runs.
#if LTAT_MULTIVERSION
#define LTAT_CPU_KERNEL(name, Args)     \
  LTAT_DECLARE_IN(baseline, name, Args) \
  LTAT_DECLARE_IN(avx2, name, Args)     \
  LTAT_DECLARE_IN(avx512, name, Args)
#else
#define LTAT_CPU_KERNEL(name, Args) LTAT_DECLARE_IN(baseline, name, Args)
#endif
