// Indirect gradient matching, by row. Formulas: ltat_fast/ops/igdm.py. The CUDA kernels take the same struct.
#pragma once

#include "dispatch.h"

namespace ltat {

enum class Divergence { kl, l1, l2 };

struct Igdm {
  const void *student_plus, *student_minus, *teacher_plus, *teacher_minus;  // (B, C) contiguous
  void* loss;                                                               // (B,), forward
  GradLoss grad_loss;                                                       // backward
  void *grad_plus, *grad_minus;                                             // (B, C) contiguous, backward
  int64_t rows, classes;
  Divergence divergence;
  Dtype dtype;
};

LTAT_CPU_KERNEL(igdm_forward, Igdm)   // a unit is a row
LTAT_CPU_KERNEL(igdm_backward, Igdm)  // a unit is a row

}  // namespace ltat

#ifdef LTAT_ISA  // the loops, compiled once for each instruction set
#include "math.h"

namespace ltat::LTAT_ISA {
namespace {

template <typename T>
struct IgdmRow {  // the logit differences of one sample
  using W = work_t<T>;
  const T *student_plus, *student_minus, *teacher_plus, *teacher_minus;

  LTAT_INLINE IgdmRow(const Igdm& args, int64_t i)
      : student_plus(static_cast<const T*>(args.student_plus) + i * args.classes),
        student_minus(static_cast<const T*>(args.student_minus) + i * args.classes),
        teacher_plus(static_cast<const T*>(args.teacher_plus) + i * args.classes),
        teacher_minus(static_cast<const T*>(args.teacher_minus) + i * args.classes) {}
  LTAT_INLINE W student(int64_t c) const { return load(student_plus[c]) - load(student_minus[c]); }
  LTAT_INLINE W teacher(int64_t c) const { return load(teacher_plus[c]) - load(teacher_minus[c]); }
};

template <typename T>
struct IgdmSoftmaxes {  // of both differences, relative to their maxima; a and b hold the last chunk of the row
  using W = work_t<T>;
  const IgdmRow<T>& row;
  Chunk<W> a, b;
  W max_a = -INFINITY, max_b = -INFINITY, sum_a = 0, sum_b = 0, dot = 0;

  LTAT_INLINE void read(int64_t first, int64_t size, Duplicates duplicates) {
    a.fill(size, duplicates, [&](int64_t l) { return row.student(first + l); });
    b.fill(size, duplicates, [&](int64_t l) { return row.teacher(first + l); });
  }

  LTAT_INLINE IgdmSoftmaxes(const IgdmRow<T>& from, int64_t classes) : row(from) {
    each_chunk(classes, [&](int64_t first, int64_t size) {
      read(first, size, Duplicates::minus_infinity);
      const int64_t padded = a.padded;
      W top_a = max_a, top_b = max_b;
#pragma omp simd reduction(max : top_a, top_b)
      for (int64_t l = 0; l < padded; ++l) {
        top_a = a[l] > top_a ? a[l] : top_a;
        top_b = b[l] > top_b ? b[l] : top_b;
      }
      max_a = top_a, max_b = top_b;
    });
    each_chunk(classes, [&](int64_t first, int64_t size) {
      if (classes > kChunk) read(first, size, Duplicates::minus_infinity);
      const int64_t padded = a.padded;
      const W top_a = max_a, top_b = max_b;
      W part_a = 0, part_b = 0, part_dot = 0;
#pragma omp simd reduction(+ : part_a, part_b, part_dot)
      for (int64_t l = 0; l < padded; ++l) {
        const W log_q = a[l] - top_a, log_p = b[l] - top_b, p = exp(log_p);  // p and q are not normalised
        part_a += exp(log_q);
        part_b += p;
        part_dot += p == 0 ? W{0} : p * (log_p - log_q);  // 0 log 0 = 0, also where log_q is -inf
      }
      sum_a += part_a, sum_b += part_b, dot += part_dot;
    });
  }
};

template <typename T>
void igdm_forward_rows(const Igdm& args, int64_t begin, int64_t end) {
  using W = work_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const IgdmRow<T> row(args, i);
    W loss = 0;
    if (args.divergence == Divergence::kl) {
      const IgdmSoftmaxes<T> s(row, args.classes);
      loss = s.dot / s.sum_b + (log(s.sum_a) - log(s.sum_b));
    } else if (args.divergence == Divergence::l1) {
#pragma omp simd reduction(+ : loss)
      for (int64_t c = 0; c < args.classes; ++c) loss += std::abs(row.student(c) - row.teacher(c));
    } else {
#pragma omp simd reduction(+ : loss)
      for (int64_t c = 0; c < args.classes; ++c) {
        const W gap = row.student(c) - row.teacher(c);
        loss += gap * gap;
      }
    }
    static_cast<W*>(args.loss)[i] = loss;
  }
}

template <typename T>
void igdm_backward_rows(const Igdm& args, int64_t begin, int64_t end) {
  using W = work_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const IgdmRow<T> row(args, i);
    const W grad = row_gradient<W>(args.grad_loss, i);
    T* plus = static_cast<T*>(args.grad_plus) + i * args.classes;
    T* minus = static_cast<T*>(args.grad_minus) + i * args.classes;
    const auto write = [&](int64_t c, W d) {
      plus[c] = store<T>(d);
      minus[c] = store<T>(-d);
    };
    if (args.divergence == Divergence::kl) {
      IgdmSoftmaxes<T> s(row, args.classes);
      const W max_a = s.max_a, max_b = s.max_b, scale_a = grad / s.sum_a, scale_b = grad / s.sum_b;
      each_chunk(args.classes, [&](int64_t first, int64_t size) {
        s.read(first, size, Duplicates::keep);
        const int64_t padded = s.a.padded;
#pragma omp simd
        for (int64_t l = 0; l < padded; ++l) s.a[l] = exp(s.a[l] - max_a) * scale_a - exp(s.b[l] - max_b) * scale_b;
        s.a.write([&](int64_t l, W d) { write(first + l, d); });
      });
    } else if (args.divergence == Divergence::l1) {
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) {
        const W gap = row.student(c) - row.teacher(c);
        write(c, (gap > 0 ? grad : W{0}) - (gap < 0 ? grad : W{0}));
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) write(c, 2 * grad * (row.student(c) - row.teacher(c)));
    }
  }
}

}  // namespace

void igdm_forward(const Igdm& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto t) { igdm_forward_rows<decltype(t)>(args, begin, end); });
}

void igdm_backward(const Igdm& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto t) { igdm_backward_rows<decltype(t)>(args, begin, end); });
}

}  // namespace ltat::LTAT_ISA
#endif
