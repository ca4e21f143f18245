// Balanced softmax cross-entropy plus KL to a teacher, by row. Formulas: ltat_fast/ops/balanced_softmax_kl.py.
//
// All terms, also those of the KL, are relative to the maximum of the row, so that logits of 1e4 lose no digits. For
// the same reason the maxima and the logarithms of the sums are stored separately for the backward.
#pragma once

#include "dispatch.h"

namespace ltat {

struct BalancedSoftmaxKl {
  const void *logits, *teacher;  // (B, C), unit column stride; teacher may be null
  const int64_t* labels;         // (B,), each in [0, C); the caller checks this
  const void* log_prior;         // (C,)
  void* stats;                   // (2 or 6, B): max and log-sum of the balanced, student and teacher softmax
  void* loss;                    // (B,), forward
  GradLoss grad_loss;            // backward
  void* grad_logits;             // (B, C) contiguous, backward
  int64_t rows, classes, logits_stride, teacher_stride;
  int64_t smoothed_classes;  // number of classes whose log_prior is not -inf; they share the smoothed label
  double kl_weight, temperature, label_smoothing;
  Dtype dtype;
};

LTAT_CPU_KERNEL(balanced_softmax_kl_forward, BalancedSoftmaxKl)   // a unit is a row
LTAT_CPU_KERNEL(balanced_softmax_kl_backward, BalancedSoftmaxKl)  // a unit is a row

}  // namespace ltat

#ifdef LTAT_ISA  // the loops, compiled once for each instruction set
#include "math.h"

namespace ltat::LTAT_ISA {
namespace {

template <typename T, bool kTeacher>
struct BalancedRow {  // one chunk of a row at a time
  using W = work_t<T>;
  const T *logits, *teacher;
  const W* prior;
  Chunk<W> b, s, t;  // balanced, student and teacher logits

  BalancedRow(const BalancedSoftmaxKl& a, int64_t i)
      : logits(static_cast<const T*>(a.logits) + i * a.logits_stride),
        teacher(kTeacher ? static_cast<const T*>(a.teacher) + i * a.teacher_stride : nullptr),
        prior(static_cast<const W*>(a.log_prior)) {}

  LTAT_INLINE void read(int64_t first, int64_t size, Duplicates duplicates) {
    b.fill(size, duplicates, [&](int64_t l) { return load(logits[first + l]) + prior[first + l]; });
    if constexpr (kTeacher) {
      s.fill(size, duplicates, [&](int64_t l) { return load(logits[first + l]); });
      t.fill(size, duplicates, [&](int64_t l) { return load(teacher[first + l]); });
    }
  }
};

template <typename T, bool kTeacher, bool kSmooth>
void balanced_softmax_kl_forward_rows(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  using W = work_t<T>;
  W* stats = static_cast<W*>(a.stats);
  const W inv_temperature = 1 / a.temperature;
  const W hard = 1 - a.label_smoothing, share = a.label_smoothing / a.smoothed_classes;
  for (int64_t i = begin; i < end; ++i) {
    BalancedRow<T, kTeacher> row(a, i);
    W max_b = -INFINITY, max_s = -INFINITY, max_t = -INFINITY;
    each_chunk(a.classes, [&](int64_t first, int64_t size) {
      row.read(first, size, Duplicates::minus_infinity);
      const int64_t padded = row.b.padded;
      W top_b = max_b, top_s = max_s, top_t = max_t;
#pragma omp simd reduction(max : top_b, top_s, top_t)
      for (int64_t l = 0; l < padded; ++l) {
        top_b = row.b[l] > top_b ? row.b[l] : top_b;
        if constexpr (kTeacher) {
          top_s = row.s[l] > top_s ? row.s[l] : top_s;
          top_t = row.t[l] > top_t ? row.t[l] : top_t;
        }
      }
      max_b = top_b, max_s = top_s, max_t = top_t;
    });
    W sum_b = 0, sum_s = 0, sum_t = 0, sum_dot = 0;
    W sum_finite = 0, finite = 0;  // of the balanced logits above -inf: their sum relative to the maximum, their number
    each_chunk(a.classes, [&](int64_t first, int64_t size) {
      if (a.classes > kChunk) row.read(first, size, Duplicates::minus_infinity);
      const int64_t padded = row.b.padded;
      W part_b = 0, part_s = 0, part_t = 0, part_dot = 0, part_sum_finite = 0, part_finite = 0;
#pragma omp simd reduction(+ : part_b, part_s, part_t, part_dot, part_sum_finite, part_finite)
      for (int64_t l = 0; l < padded; ++l) {
        part_b += exp(row.b[l] - max_b);
        if constexpr (kSmooth) {
          const bool is_finite = row.b[l] > -static_cast<W>(INFINITY);
          part_sum_finite += is_finite ? row.b[l] - max_b : W{0};
          part_finite += is_finite ? W{1} : W{0};
        }
        if constexpr (kTeacher) {
          const W log_q = (row.s[l] - max_s) * inv_temperature, log_p = (row.t[l] - max_t) * inv_temperature;
          const W p = exp(log_p);  // p and q are not normalised
          part_s += exp(log_q);
          part_t += p;
          part_dot += p == 0 ? W{0} : p * (log_p - log_q);  // 0 log 0 = 0, also where log_q is -inf
        }
      }
      sum_b += part_b, sum_s += part_s, sum_t += part_t, sum_dot += part_dot;
      sum_finite += part_sum_finite, finite += part_finite;
    });
    const int64_t y = a.labels[i];
    const W log_b = log(sum_b);
    W loss;
    if constexpr (kSmooth) {
      loss = log_b - hard * (load(row.logits[y]) + row.prior[y] - max_b) - share * sum_finite;
      // A logit of -inf of a class that shares the label. A NaN, which is not finite either, stays in log_b.
      if (finite < a.smoothed_classes) loss += static_cast<W>(INFINITY);
    } else {
      loss = log_b - (load(row.logits[y]) + row.prior[y] - max_b);
    }
    stats[i] = max_b;
    stats[a.rows + i] = log_b;
    if constexpr (kTeacher) {
      const W log_s = log(sum_s), log_t = log(sum_t);
      loss += static_cast<W>(a.kl_weight) * (sum_dot / sum_t + (log_s - log_t));
      stats[2 * a.rows + i] = max_s;
      stats[3 * a.rows + i] = log_s;
      stats[4 * a.rows + i] = max_t;
      stats[5 * a.rows + i] = log_t;
    }
    static_cast<W*>(a.loss)[i] = loss;
  }
}

template <typename T, bool kTeacher, bool kSmooth>
void balanced_softmax_kl_backward_rows(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  using W = work_t<T>;
  const W* stats = static_cast<const W*>(a.stats);
  const W* prior = static_cast<const W*>(a.log_prior);
  const W hard = 1 - a.label_smoothing, share = a.label_smoothing / a.smoothed_classes;
  const auto minus_share = [&](int64_t c, W d) {
    if constexpr (kSmooth) return prior[c] > -static_cast<W>(INFINITY) ? d - share : d;
    return d;
  };
  const W inv_temperature = 1 / a.temperature, weight = a.kl_weight / a.temperature;
  for (int64_t i = begin; i < end; ++i) {
    BalancedRow<T, kTeacher> row(a, i);
    T* grad_logits = static_cast<T*>(a.grad_logits) + i * a.classes;
    const int64_t y = a.labels[i];
    const W grad = row_gradient<W>(a.grad_loss, i), max_b = stats[i], log_b = stats[a.rows + i];
    const W max_s = kTeacher ? stats[2 * a.rows + i] : 0, log_s = kTeacher ? stats[3 * a.rows + i] : 0;
    const W max_t = kTeacher ? stats[4 * a.rows + i] : 0, log_t = kTeacher ? stats[5 * a.rows + i] : 0;
    each_chunk(a.classes, [&](int64_t first, int64_t size) {
      row.read(first, size, Duplicates::keep);
      const int64_t padded = row.b.padded;
#pragma omp simd
      for (int64_t l = 0; l < padded; ++l) {
        W d = exp(row.b[l] - max_b - log_b);
        if constexpr (kTeacher) {
          const W q = exp((row.s[l] - max_s) * inv_temperature - log_s);
          const W p = exp((row.t[l] - max_t) * inv_temperature - log_t);
          d += weight * (q - p);
        }
        row.b[l] = d;
      }
      row.b.write([&](int64_t l, W d) { grad_logits[first + l] = store<T>(grad * minus_share(first + l, d)); });
      if (first <= y && y < first + size) {
        grad_logits[y] = store<T>(grad * (minus_share(y, row.b[row.b.entry(y - first)]) - (kSmooth ? hard : W{1})));
      }
    });
  }
}

// Calls f with the element type of a (as a value) and whether it has a teacher and smoothed labels (as types).
template <typename F>
void with_variant(const BalancedSoftmaxKl& a, F f) {
  with_dtype(a.dtype, [&](auto t) {
    const auto with_teacher = [&](auto teacher) {
      a.label_smoothing != 0 ? f(t, teacher, std::true_type{}) : f(t, teacher, std::false_type{});
    };
    a.teacher ? with_teacher(std::true_type{}) : with_teacher(std::false_type{});
  });
}

}  // namespace

void balanced_softmax_kl_forward(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  with_variant(a, [&](auto t, auto teacher, auto smooth) {
    balanced_softmax_kl_forward_rows<decltype(t), teacher.value, smooth.value>(a, begin, end);
  });
}

void balanced_softmax_kl_backward(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  with_variant(a, [&](auto t, auto teacher, auto smooth) {
    balanced_softmax_kl_backward_rows<decltype(t), teacher.value, smooth.value>(a, begin, end);
  });
}

}  // namespace ltat::LTAT_ISA
#endif
