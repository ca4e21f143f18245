// The limits of PGD (step size, radius of the ball, range), which may differ between images and between channels.
#pragma once

#include "dispatch.h"

namespace ltat {

// A dimension along which a limit differs. The element at position p of memory has the index p / stride % size.
struct Axis {
  int64_t stride, size;
};

// A number (data is null), or values in the dtype of the arithmetic: data[o * strides[0] + i * strides[1]], where o and
// i are the indices along the outer and the inner axis.
struct Limit {
  double number;
  const void* data;
  int64_t strides[2];
};

struct Limits {
  Limit step_size, eps, lower, upper;
  Axis outer, inner;  // outer.stride >= inner.stride * inner.size
};

}  // namespace ltat

#ifdef LTAT_ISA
#include "math.h"

namespace ltat::LTAT_ISA {
namespace {

// The limits of consecutive elements: eps[l] is that of element l. V is Same<W> or const W*.
template <typename V>
struct Piece {
  V step_size, eps, lower, upper;
};

template <typename W>
struct Same {
  W value;
  LTAT_INLINE W operator[](int64_t) const { return value; }
};

// Splits ranges of positions into pieces, so that a vector loop over a piece needs no index of an image or channel. If
// all limits are numbers, a range is one piece.
template <typename W>
class Pieces {
 public:
  explicit Pieces(const Limits& limits)
      : limits_(limits),
        period_(limits.inner.stride * limits.inner.size),
        tabled_(limits.inner.stride < kShortRun && period_ <= kLongestPeriod) {}

  // Calls visit(piece, begin, end) for the pieces of [begin, end), in order. Ranges must be given in ascending order.
  template <typename F>
  LTAT_INLINE void each(int64_t begin, int64_t end, F visit) {
    while (begin < end) {
      if (begin >= run_end_) start_run(begin);
      int64_t stop = end < run_end_ ? end : run_end_;
      if (tabled_) {
        stop = stop - begin < kPiece ? stop : begin + kPiece;
        const int64_t phase = begin % period_;
        visit(Piece<const W*>{step_size_ + phase, eps_ + phase, lower_ + phase, upper_ + phase}, begin, stop);
      } else {
        visit(Piece<Same<W>>{{*step_size_}, {*eps_}, {*lower_}, {*upper_}}, begin, stop);
      }
      begin = stop;
    }
  }

 private:
  static constexpr int64_t kShortRun = 64;  // shorter runs of equal limits are not worth a vector loop of their own
  static constexpr int64_t kLongestPeriod = 1024;
  static constexpr int64_t kPiece = 256;

  // A run has equal limits, or with a table, limits that repeat with the period of the inner axis.
  void start_run(int64_t begin) {
    const Axis &outer = limits_.outer, &inner = limits_.inner, &axis = tabled_ ? outer : inner;
    run_end_ = (begin / axis.stride + 1) * axis.stride;
    const int64_t o = begin / outer.stride % outer.size;
    if (!tabled_) return set(0, o, begin / inner.stride % inner.size);
    for (int64_t l = 0; l < period_; ++l) set(l, o, l / inner.stride);
    const int64_t filled = period_ + (axis.stride < kPiece ? axis.stride : kPiece);
    for (int64_t l = period_; l < filled; ++l) {
      step_size_[l] = step_size_[l - period_], eps_[l] = eps_[l - period_];
      lower_[l] = lower_[l - period_], upper_[l] = upper_[l - period_];
    }
  }

  void set(int64_t l, int64_t o, int64_t i) {
    step_size_[l] = value(limits_.step_size, o, i), eps_[l] = value(limits_.eps, o, i);
    lower_[l] = value(limits_.lower, o, i), upper_[l] = value(limits_.upper, o, i);
    const bool numbers = eps_[l] == eps_[l] && lower_[l] == lower_[l] && upper_[l] == upper_[l];
    if (!numbers) step_size_[l] = eps_[l] = NAN;  // the comparisons of the loops do not see a NaN in the others
  }

  static W value(const Limit& limit, int64_t o, int64_t i) {
    if (limit.data == nullptr) return limit.number;
    return static_cast<const W*>(limit.data)[o * limit.strides[0] + i * limit.strides[1]];
  }

  const Limits& limits_;
  const int64_t period_;
  const bool tabled_;
  int64_t run_end_ = 0;
  W step_size_[kLongestPeriod + kPiece], eps_[kLongestPeriod + kPiece];
  W lower_[kLongestPeriod + kPiece], upper_[kLongestPeriod + kPiece];
};

}  // namespace
}  // namespace ltat::LTAT_ISA
#endif
