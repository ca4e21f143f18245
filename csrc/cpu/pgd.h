// Start noise and ascent step of PGD. Formulas: ltat_fast/ops/pgd.py.
#pragma once

#include "limits.h"

namespace ltat {

enum class Noise { uniform, gaussian };

struct PgdStep {
  const void *x_adv, *grad, *x;
  void* out;  // may be x_adv
  Limits limits;
  Dtype dtype, grad_dtype;
};

struct PgdInit {
  const void* x;
  void* out;  // may be x
  int64_t numel;
  uint64_t seed;
  Limits limits;  // in place of the step size: half-width of the uniform noise, or standard deviation of the gaussian
  Noise noise;
  Dtype dtype;
};

LTAT_CPU_KERNEL(pgd_step, PgdStep)  // a unit is an element
LTAT_CPU_KERNEL(pgd_init, PgdInit)  // a unit is four elements, which share one Philox block

}  // namespace ltat

#ifdef LTAT_ISA  // the loops, compiled once for each instruction set
#include "math.h"

namespace ltat::LTAT_ISA {
namespace {

template <typename W>
LTAT_INLINE W clamp(W v, W low, W high) {
  v = v < low ? low : v;  // comparisons with NaN are false: a NaN in v stays
  return v > high ? high : v;
}

template <typename T, typename G, typename V>
void pgd_step_piece(const PgdStep& a, Piece<V> limits, int64_t begin, int64_t end) {
  using W = work_t<T>;
  // No __restrict__, because out may be x_adv. An iteration reads index i before it writes it, so iterations are
  // independent.
  const T* x_adv = static_cast<const T*>(a.x_adv);
  const G* grad = static_cast<const G*>(a.grad);
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const W step = limits.step_size[i - begin], eps = limits.eps[i - begin];
    const W centre = load(x[i]), low = centre - eps, high = centre + eps;
    const auto g = load(grad[i]);
    W v = load(x_adv[i]);
    v += (g > 0 ? step : W{0}) - (g < 0 ? step : W{0});  // sign(0) = sign(NaN) = 0, as torch.sign
    v = clamp<W>(clamp<W>(v, low, high), limits.lower[i - begin], limits.upper[i - begin]);
    out[i] = store<T>(low == low && high == high ? v : low + high);  // a NaN in x or eps, or inf - inf, gives NaN
  }
}

// Philox4x32-10 (Salmon et al. 2011): the four words of block `counter` under `key`. Same counters as kernels/pgd.py.
LTAT_INLINE void philox(uint64_t counter, uint64_t key, uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  uint32_t c0 = counter, c1 = counter >> 32, c2 = 0, c3 = 0, k0 = key, k1 = key >> 32;
  const auto round = [&] {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  };
  round(), round(), round(), round(), round(), round(), round(), round(), round(), round();
  w0 = c0, w1 = c1, w2 = c2, w3 = c3;
}

LTAT_INLINE float uniform01(uint32_t w) {  // 31 bits; rounds up to 1 once in 2^25 draws
  const int32_t k = static_cast<int32_t>(w);
  return static_cast<float>(k < 0 ? -k - 1 : k) * 0x1p-31f;
}

LTAT_INLINE void normal_pair(float& u, float& v) {  // Box and Muller 1958, from two uniforms
  const float radius = std::sqrt(-2.f * log(u > 1e-7f ? u : 1e-7f));
  float sine, cosine;
  sincos_turns(v, sine, cosine);
  u = radius * cosine;
  v = radius * sine;
}

template <typename T>
void pgd_init_loop(const PgdInit& a, int64_t begin, int64_t end) {
  using W = work_t<T>;
  constexpr int64_t kQuads = 64;  // quads per iteration: full vectors, and the draws stay in the L1 cache
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  Pieces<W> pieces(a.limits);
  const uint64_t seed = a.seed;
  uint32_t w0[kQuads], w1[kQuads], w2[kQuads], w3[kQuads];
  float draws[4 * kQuads];
  for (int64_t q = begin; q < end; q += kQuads) {
    for (int64_t l = 0; l < kQuads; ++l) philox(q + l, seed, w0[l], w1[l], w2[l], w3[l]);
    for (int64_t l = 0; l < kQuads; ++l) {
      float u0 = uniform01(w0[l]), u1 = uniform01(w1[l]), u2 = uniform01(w2[l]), u3 = uniform01(w3[l]);
      draws[4 * l + 0] = u0, draws[4 * l + 1] = u1, draws[4 * l + 2] = u2, draws[4 * l + 3] = u3;
    }
    if (a.noise == Noise::uniform) {
      for (int64_t i = 0; i < 4 * kQuads; ++i) draws[i] = 2.f * draws[i] - 1.f;
    } else {
      for (int64_t i = 0; i < 4 * kQuads; i += 2) normal_pair(draws[i], draws[i + 1]);
    }
    const int64_t first = 4 * q, last = 4 * (q + kQuads < end ? q + kQuads : end);
    const int64_t stop = last < a.numel ? last : a.numel;
    pieces.each(first, stop, [&](auto limits, int64_t piece, int64_t piece_end) {
#pragma omp simd
      for (int64_t i = piece; i < piece_end; ++i) {
        const W centre = load(x[i]), eps = limits.eps[i - piece];
        const W v = centre + limits.step_size[i - piece] * draws[i - first];  // NaN if x or a limit is
        const W projected = clamp<W>(v, centre - eps, centre + eps);
        out[i] = store<T>(clamp<W>(projected, limits.lower[i - piece], limits.upper[i - piece]));
      }
    });
  }
}

}  // namespace

void pgd_step(const PgdStep& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    Pieces<work_t<decltype(t)>> pieces(a.limits);
    with_dtype(a.grad_dtype, [&](auto g) {
      pieces.each(begin, end, [&](auto limits, int64_t first, int64_t last) {
        pgd_step_piece<decltype(t), decltype(g)>(a, limits, first, last);
      });
    });
  });
}

void pgd_init(const PgdInit& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) { pgd_init_loop<decltype(t)>(a, begin, end); });
}

}  // namespace ltat::LTAT_ISA
#endif
