// Balanced softmax cross-entropy plus KL to a teacher, by row. See ltat_fast/ops/balanced_softmax_kl.py for the formulas.
//
// Everything is relative to the row's maximum, also the KL, so that logits of 1e4 lose no digits. The maxima and the
// logarithms of the sums are kept apart for the backward for the same reason.

template <typename T, bool kTeacher>
void balanced_softmax_kl_forward_rows(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  using W = work_t<T>;
  const W* prior = static_cast<const W*>(a.log_prior);
  W* stats = static_cast<W*>(a.stats);
  const W inv_temperature = 1 / a.temperature, infinity = INFINITY;
  for (int64_t i = begin; i < end; ++i) {
    const T* z = static_cast<const T*>(a.logits) + i * a.logits_stride;
    const T* t = kTeacher ? static_cast<const T*>(a.teacher) + i * a.teacher_stride : nullptr;
    W max_b = -infinity, max_s = -infinity, max_t = -infinity;
#pragma omp simd reduction(max : max_b, max_s, max_t)
    for (int64_t c = 0; c < a.classes; ++c) {
      const W zc = load(z[c]), bc = zc + prior[c];
      max_b = bc > max_b ? bc : max_b;
      if constexpr (kTeacher) {
        const W tc = load(t[c]);
        max_s = zc > max_s ? zc : max_s;
        max_t = tc > max_t ? tc : max_t;
      }
    }
    W sum_b = 0, sum_s = 0, sum_t = 0, dot = 0;
#pragma omp simd reduction(+ : sum_b, sum_s, sum_t, dot)
    for (int64_t c = 0; c < a.classes; ++c) {
      const W zc = load(z[c]);
      sum_b += exp(zc + prior[c] - max_b);
      if constexpr (kTeacher) {
        const W log_q = (zc - max_s) * inv_temperature, log_p = (load(t[c]) - max_t) * inv_temperature;  // unnormalised
        const W p = exp(log_p);
        sum_s += exp(log_q);
        sum_t += p;
        dot += p == 0 ? W{0} : p * (log_p - log_q);  // p log p -> 0; and 0 * inf is none of ours
      }
    }
    const int64_t y = a.labels[i];
    const W log_b = std::log(sum_b);
    W loss = log_b - (load(z[y]) + prior[y] - max_b);
    stats[i] = max_b;
    stats[a.rows + i] = log_b;
    if constexpr (kTeacher) {
      const W log_s = std::log(sum_s), log_t = std::log(sum_t);
      loss += static_cast<W>(a.kl_weight) * (dot / sum_t + log_s - log_t);
      stats[2 * a.rows + i] = max_s;
      stats[3 * a.rows + i] = log_s;
      stats[4 * a.rows + i] = max_t;
      stats[5 * a.rows + i] = log_t;
    }
    static_cast<W*>(a.loss)[i] = loss;
  }
}

template <typename T, bool kTeacher>
void balanced_softmax_kl_backward_rows(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  using W = work_t<T>;
  const W* prior = static_cast<const W*>(a.log_prior);
  const W* stats = static_cast<const W*>(a.stats);
  const W inv_temperature = 1 / a.temperature, weight = a.kl_weight / a.temperature;
  for (int64_t i = begin; i < end; ++i) {
    const T* z = static_cast<const T*>(a.logits) + i * a.logits_stride;
    const T* t = kTeacher ? static_cast<const T*>(a.teacher) + i * a.teacher_stride : nullptr;
    T* grad_z = static_cast<T*>(a.grad_logits) + i * a.classes;
    const W grad = row_gradient<W>(a.grad_loss, i);
    const W max_b = stats[i], log_b = stats[a.rows + i];
    const W max_s = kTeacher ? stats[2 * a.rows + i] : 0, log_s = kTeacher ? stats[3 * a.rows + i] : 0;
    const W max_t = kTeacher ? stats[4 * a.rows + i] : 0, log_t = kTeacher ? stats[5 * a.rows + i] : 0;
    const auto slope = [&](int64_t c) {  // d loss / d z_c, short of the label's -1
      const W zc = load(z[c]);
      W d = exp(zc + prior[c] - max_b - log_b);
      if constexpr (kTeacher) {
        const W q = exp((zc - max_s) * inv_temperature - log_s);
        const W p = exp((load(t[c]) - max_t) * inv_temperature - log_t);
        d += weight * (q - p);
      }
      return d;
    };
#pragma omp simd
    for (int64_t c = 0; c < a.classes; ++c) grad_z[c] = store<T>(grad * slope(c));
    const int64_t y = a.labels[i];
    grad_z[y] = store<T>(grad * (slope(y) - 1));
  }
}

void balanced_softmax_kl_forward(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.teacher ? balanced_softmax_kl_forward_rows<T, true>(a, begin, end)
              : balanced_softmax_kl_forward_rows<T, false>(a, begin, end);
  });
}

void balanced_softmax_kl_backward(const BalancedSoftmaxKl& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.teacher ? balanced_softmax_kl_backward_rows<T, true>(a, begin, end)
              : balanced_softmax_kl_backward_rows<T, false>(a, begin, end);
  });
}
