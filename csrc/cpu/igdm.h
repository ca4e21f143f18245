// Indirect gradient matching, by row. See ltat_fast/ops/igdm.py for the formulas.

template <typename T>
struct IgdmRow {  // the two logit differences of one sample
  const T *student_plus, *student_minus, *teacher_plus, *teacher_minus;
  IgdmRow(const Igdm& args, int64_t i)
      : student_plus(static_cast<const T*>(args.student_plus) + i * args.classes),
        student_minus(static_cast<const T*>(args.student_minus) + i * args.classes),
        teacher_plus(static_cast<const T*>(args.teacher_plus) + i * args.classes),
        teacher_minus(static_cast<const T*>(args.teacher_minus) + i * args.classes) {}
  LTAT_INLINE work_t<T> a(int64_t c) const { return load(student_plus[c]) - load(student_minus[c]); }
  LTAT_INLINE work_t<T> b(int64_t c) const { return load(teacher_plus[c]) - load(teacher_minus[c]); }
};

template <typename T>
struct IgdmSoftmax {  // maxima and sums of exponentials of both differences
  using W = work_t<T>;
  W max_a = -INFINITY, max_b = -INFINITY, sum_a = 0, sum_b = 0, dot = 0;
  LTAT_INLINE IgdmSoftmax(const IgdmRow<T>& row, int64_t classes) {
    W top_a = -INFINITY, top_b = -INFINITY, total_a = 0, total_b = 0, total = 0;
#pragma omp simd reduction(max : top_a, top_b)
    for (int64_t c = 0; c < classes; ++c) {
      const W a = row.a(c), b = row.b(c);
      top_a = a > top_a ? a : top_a;
      top_b = b > top_b ? b : top_b;
    }
#pragma omp simd reduction(+ : total_a, total_b, total)
    for (int64_t c = 0; c < classes; ++c) {
      const W log_q = row.a(c) - top_a, log_p = row.b(c) - top_b;
      const W p = exp(log_p);
      total_a += exp(log_q);
      total_b += p;
      total += p == 0 ? W{0} : p * (log_p - log_q);
    }
    max_a = top_a, max_b = top_b, sum_a = total_a, sum_b = total_b, dot = total;
  }
};

template <typename T>
void igdm_forward_rows(const Igdm& args, int64_t begin, int64_t end) {
  using W = work_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const IgdmRow<T> row(args, i);
    W loss = 0;
    if (args.divergence == Divergence::kl) {
      const IgdmSoftmax<T> s(row, args.classes);
      loss = s.dot / s.sum_b + std::log(s.sum_a) - std::log(s.sum_b);
    } else if (args.divergence == Divergence::l1) {
#pragma omp simd reduction(+ : loss)
      for (int64_t c = 0; c < args.classes; ++c) loss += std::abs(row.a(c) - row.b(c));
    } else {
#pragma omp simd reduction(+ : loss)
      for (int64_t c = 0; c < args.classes; ++c) loss += (row.a(c) - row.b(c)) * (row.a(c) - row.b(c));
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
    if (args.divergence == Divergence::kl) {
      const IgdmSoftmax<T> s(row, args.classes);
      const W inv_a = 1 / s.sum_a, inv_b = 1 / s.sum_b;
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) {
        const W d = grad * (exp(row.a(c) - s.max_a) * inv_a - exp(row.b(c) - s.max_b) * inv_b);
        plus[c] = store<T>(d);
        minus[c] = store<T>(-d);
      }
    } else if (args.divergence == Divergence::l1) {
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) {
        const W gap = row.a(c) - row.b(c), d = (gap > 0 ? grad : W{0}) - (gap < 0 ? grad : W{0});
        plus[c] = store<T>(d);
        minus[c] = store<T>(-d);
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < args.classes; ++c) {
        const W d = 2 * grad * (row.a(c) - row.b(c));
        plus[c] = store<T>(d);
        minus[c] = store<T>(-d);
      }
    }
  }
}

void igdm_forward(const Igdm& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto t) { igdm_forward_rows<decltype(t)>(args, begin, end); });
}

void igdm_backward(const Igdm& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto t) { igdm_backward_rows<decltype(t)>(args, begin, end); });
}
