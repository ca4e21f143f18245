// Element types and math functions of the CPU kernels. The compiler can vectorise loops over them for each instruction
// set.
//
// NaN and infinity behave as in torch. exp returns 0 below the normal range, an absolute error of 1e-38.
#pragma once

#include "dispatch.h"

#define LTAT_INLINE [[gnu::always_inline]] inline

namespace ltat::LTAT_ISA {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <typename To, typename From>
LTAT_INLINE To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T> struct Work { using type = float; };
template <> struct Work<double> { using type = double; };
template <typename T> using work_t = typename Work<T>::type;

LTAT_INLINE float load(float v) { return v; }
LTAT_INLINE double load(double v) { return v; }
LTAT_INLINE float load(bf16 v) { return bits_to<float>(uint32_t{v.bits} << 16); }
LTAT_INLINE float load(f16 v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  const float scaled = bits_to<float>(magnitude) * 0x1p112f;  // rebias the exponent; correct for subnormals too
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN keep an all-ones exponent
  return bits_to<float>(bits_to<uint32_t>(scaled) | special | (v.bits & 0x8000u) << 16);
}

template <typename T> LTAT_INLINE T store(work_t<T> v) { return v; }
template <> LTAT_INLINE bf16 store<bf16>(float v) {
  const uint32_t u = bits_to<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;  // to nearest even
  return {static_cast<uint16_t>(v == v ? rounded : 0x7fc0u)};
}
template <> LTAT_INLINE f16 store<f16>(float v) {
  const uint32_t u = bits_to<uint32_t>(v), magnitude = u & 0x7fffffffu;
  // normal results: round 13 bits off, to nearest even, and rebias; a carry into infinity is correct
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // subnormal results: adding 0.5 aligns the bits, and the addition rounds them
  const uint32_t subnormal = bits_to<uint32_t>(bits_to<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return {static_cast<uint16_t>(h | (u >> 16 & 0x8000u))};
}

// e^x for x <= 88: x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of e^r (remainder 5e-9)
LTAT_INLINE float exp(float x) {
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // the low mantissa bits now hold n, rounded to nearest
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float power = bits_to<float>((bits_to<uint32_t>(shifted) + 127u) << 23);  // 2^n
  return x < -87.3f ? 0.f : p * power;
}
LTAT_INLINE double exp(double x) { return std::exp(x); }

// ln x for normal x > 0: x = 2^n m, m in [sqrt(1/2), sqrt(2)), and ln m = 2 atanh((m - 1) / (m + 1)) (remainder 4e-9)
LTAT_INLINE float log(float x) {
  const uint32_t u = bits_to<uint32_t>(x) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(u) >> 23);
  const float m = bits_to<float>((u & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.f) / (m + 1.f), s2 = s * s;
  const float series = 1.f + s2 * (1.f / 3 + s2 * (1.f / 5 + s2 * (1.f / 7 + s2 * (1.f / 9))));
  const float result = n * 0.693359375f + (2.f * s * series - n * 2.12194440e-4f);
  return x == x ? result : x;
}
LTAT_INLINE double log(double x) { return std::log(x); }

// sine and cosine of `turn` full turns, 0 <= turn <= 1: nearest quarter turn, and Taylor series of the rest (1e-9)
LTAT_INLINE void sincos_turns(float turn, float& sine, float& cosine) {
  const float quarters = (turn * 4.f + 0x1.8p23f) - 0x1.8p23f;
  const int32_t k = static_cast<int32_t>(quarters);
  const float a = (turn - quarters * 0.25f) * 6.28318531f, a2 = a * a;
  const float s = a * (1.f + a2 * (-1.f / 6 + a2 * (1.f / 120 + a2 * (-1.f / 5040 + a2 * (1.f / 362880)))));
  const float c = 1.f + a2 * (-0.5f + a2 * (1.f / 24 + a2 * (-1.f / 720 + a2 * (1.f / 40320))));
  const float sine_size = k & 1 ? c : s, cosine_size = k & 1 ? s : c;
  sine = k & 2 ? -sine_size : sine_size;
  cosine = (k + 1) & 2 ? -cosine_size : cosine_size;
}

// Rows are processed in chunks, converted to the working type. No loop over exponentials has a scalar remainder, which
// would take half of the time for 100 classes. Instead, the last vector of a chunk holds the last kLanes classes, so it
// repeats some classes of the vector before it. For a sum these duplicates are set to -inf, because exp(-inf) = 0.
constexpr int64_t kChunk = 256;
constexpr int kLanes = 16;
enum class Duplicates { keep, minus_infinity };

template <typename W>
struct Chunk {
  alignas(64) W data[kChunk];
  int64_t size, whole, padded;  // number of classes; number in whole vectors; number of entries to compute

  LTAT_INLINE W& operator[](int64_t l) { return data[l]; }
  LTAT_INLINE bool overlaps() const { return whole < size && size >= kLanes; }
  LTAT_INLINE int64_t entry(int64_t l) const { return l >= whole && overlaps() ? l + padded - size : l; }

  template <typename F>
  LTAT_INLINE void fill(int64_t classes, Duplicates duplicates, F value) {  // with value(l) for l = 0 ... classes - 1
    size = classes, whole = size / kLanes * kLanes, padded = (size + kLanes - 1) / kLanes * kLanes;
    for (int64_t l = 0; l < whole; ++l) data[l] = value(l);
    if (overlaps()) {
      const int64_t last = size - kLanes;
      const int duplicated = duplicates == Duplicates::keep ? 0 : padded - size;
#pragma omp simd  // without it the compiler unrolls the loop into scalar code
      for (int l = 0; l < kLanes; ++l) {
        const W v = value(last + l);
        data[whole + l] = l < duplicated ? -static_cast<W>(INFINITY) : v;
      }
    } else {
      for (int64_t l = whole; l < size; ++l) data[l] = value(l);
      for (int64_t l = size; l < padded; ++l) data[l] = -static_cast<W>(INFINITY);
    }
  }
  template <typename F>
  LTAT_INLINE void write(F sink) const {  // calls sink(l, entry) for each class; needs a fill with Duplicates::keep
    for (int64_t l = 0; l < whole; ++l) sink(l, data[l]);
    if (overlaps()) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) sink(size - kLanes + l, data[whole + l]);
    } else {
      for (int64_t l = whole; l < size; ++l) sink(l, data[l]);
    }
  }
};

template <typename F>
LTAT_INLINE void each_chunk(int64_t classes, F visit) {  // visit(first class, number of classes)
  for (int64_t first = 0; first < classes; first += kChunk) {
    visit(first, classes - first < kChunk ? classes - first : kChunk);
  }
}

template <typename W>
LTAT_INLINE W row_gradient(const GradLoss& grad, int64_t i) {
  return static_cast<const W*>(grad.data)[i * grad.stride] * static_cast<W>(grad.scale);
}

// Calls f(T{}) with the element type T that `dtype` names.
template <typename F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    case Dtype::f64: return f(double{});
  }
}

}  // namespace
}  // namespace ltat::LTAT_ISA
