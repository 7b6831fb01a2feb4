// From logits to scores, on rows of whole vectors: what route and its backward share. Lanes past the last expert hold
// z = -inf, which adds nothing to any sum.
#pragma once

#include <limits>

#include "cpu/isa/buffer.h"
#include "cpu/isa/math.h"
#include "cpu/isa/rank.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

template <class C>
inline constexpr C kMinusInf = -std::numeric_limits<C>::infinity();

// Rows are padded to whole rows of kRowKeys.
template <class C>
MOE_INLINE void pad(C* row, int64_t count, C value) {
  for (int64_t i = count; i % kRowKeys != 0; ++i) row[i] = value;
}

template <class C, class S>
MOE_INLINE void load_values(const S* from, int64_t count, C* z) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) store<C>(z + i, load<C>(from + i));
  if (i < count) store<C>(z + i, load<C>(from + i, count - i));
}

// f(pointer to a row): of float64 values for C = double, of any other for C = float.
template <class C, class F>
MOE_INLINE void visit_row(const Matrix& matrix, int64_t row, const F& f) {
  auto visit = [&]<class S>(S*)
                   __attribute__((always_inline)) { f(static_cast<S*>(matrix.data) + row * matrix.stride); };
  if constexpr (std::is_same_v<C, double>) visit(static_cast<double*>(nullptr));
  else if (matrix.dtype == Dtype::float32) visit(static_cast<float*>(nullptr));
  else if (matrix.dtype == Dtype::bfloat16) visit(static_cast<bfloat16*>(nullptr));
  else visit(static_cast<float16*>(nullptr));
}

template <class C>
MOE_INLINE void load_row(const Matrix& from, int64_t row, int64_t count, C* z) {
  visit_row<C>(from, row, [=](auto* values) { load_values<C>(values, count, z); });
  pad(z, count, kMinusInf<C>);
}

// Rows of up to so many bytes are asked for ahead. With longer ones route took up to a fifth longer, measured.
inline constexpr int64_t kRowBytesAhead = 4 << 10;

// Asks for a row that is read later; none past the last.
template <class C>
MOE_INLINE void fetch_row_ahead(const Matrix& from, int64_t row, int64_t rows, int64_t count) {
  if (row < rows && count * size_of(from.dtype) <= kRowBytesAhead)
    visit_row<C>(from, row, [=](const auto* values) __attribute__((always_inline)) { fetch_ahead<1>(values, count); });
}

template <class C, class S>
MOE_INLINE void store_values(S* to, int64_t count, const C* values) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) store<C>(to + i, load<C>(values + i));
  if (i < count) store<C>(to + i, load<C>(values + i), count - i);
}

template <class C>
MOE_INLINE void store_row(const Matrix& to, int64_t row, int64_t count, const C* values) {
  visit_row<C>(to, row, [=](auto* out) { store_values<C>(out, count, values); });
}

// z = cap * tanh(z / cap); slope = dz / dlogit where asked for.
template <class C>
MOE_INLINE void apply_softcap(C* z, int64_t count, C cap, C* slope = nullptr) {
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    Vec<C> t = tanh<C>(load<C>(z + i) / cap);
    store<C>(z + i, t * cap);
    if (slope) store<C>(slope + i, C(1) - t * t);
  }
  pad(z, count, kMinusInf<C>);
}

// A sum in float64 of whatever is added.
template <class C>
class Sum {
 public:
  MOE_INLINE void add(Vec<C> v) {
    if constexpr (std::is_same_v<C, double>) parts_[0] += v;
    else add_halves(v, std::make_integer_sequence<int, kLanes<double>>());
  }
  MOE_INLINE double total() const { return sum_lanes<double>(parts_[0] + parts_[1]); }

 private:
  template <int... i>
  MOE_INLINE void add_halves(Vec<C> v, std::integer_sequence<int, i...>) {
    parts_[0] += convert<Vec<double>>(__builtin_shufflevector(v, v, i...));
    parts_[1] += convert<Vec<double>>(__builtin_shufflevector(v, v, (kLanes<double> + i)...));
  }

  Vec<double> parts_[2]{};
};

// The sum of value(i), a vector of a row, for i in 0, kLanes, .. padded - 1. Of a few vectors in C, of those in
// float64, so that its error does not grow with the number of experts.
template <class C, class F>
MOE_INLINE double sum_over(int64_t padded, const F& value) {
  Sum<C> sum;
  for (int64_t i = 0; i < padded;) {
    Vec<C> part{};
    for (const int64_t end = i + 8 * kLanes<C>; i < padded && i < end; i += kLanes<C>) part += value(i);
    sum.add(part);
  }
  return sum.total();
}

// out = e^(z - max z), returned with their sum.
template <class C>
struct Exponentials {
  C max;
  double sum;
};

template <class C>
MOE_INLINE Exponentials<C> exponentials(const C* z, int64_t count, C* out) {
  Vec<C> max = broadcast(kMinusInf<C>);
  for (int64_t i = 0; i < count; i += kLanes<C>) {
    Vec<C> v = load<C>(z + i);
    max = v > max ? v : max;
  }
  const C m = max_of<C>(max);
  const double sum = sum_over<C>(count, [=](int64_t i) __attribute__((always_inline)) {
    const Vec<C> e = exp<C>(load<C>(z + i) - m);
    store<C>(out + i, e);
    return e;
  });
  return {m, sum};
}

// log(sum of e^z), as torch.logsumexp where all z are -inf or one is inf.
template <class C>
MOE_INLINE C log_sum_exp(const Exponentials<C>& of, const C* z, int64_t count) {
  if (of.max - of.max == C(0)) return C(double(of.max) + __builtin_log(of.sum));
  for (int64_t i = 0; i < count; ++i)
    if (z[i] != z[i]) return z[i];
  return of.max;
}

// Below it softplus(z) and e^z agree to the last bit, and e^(z / 2) is the root of numbers too small to hold.
template <class C>
inline constexpr C kSoftplusTail = sizeof(C) == 4 ? C(-20) : C(-40);

// The scores that are functions of their own logit alone; softmax and its kin leave z as it is.
template <class C>
MOE_INLINE Vec<C> score_of(Score score, Vec<C> z) {
  if (score == Score::sigmoid) return sigmoid<C>(z);
  if (score != Score::sqrtsoftplus) return z;
  return z < kSoftplusTail<C> ? exp<C>(C(0.5) * z) : square_root<C>(softplus<C>(z));
}

// d score / dz.
template <class C>
MOE_INLINE Vec<C> score_slope(Score score, Vec<C> z) {
  if (score == Score::sigmoid) {
    Vec<C> e = exp<C>(minus_abs<C>(z));
    return e / ((C(1) + e) * (C(1) + e));
  }
  if (score != Score::sqrtsoftplus) return broadcast(C(1));
  Vec<C> s = score_of<C>(score, z);
  return z < kSoftplusTail<C> ? C(0.5) * s : C(0.5) * sigmoid<C>(z) / s;
}

// out = the scores of z, returned with their sum.
template <class C>
MOE_INLINE double scores(Score score, const C* z, int64_t count, C* out) {
  return sum_over<C>(count, [=](int64_t i) __attribute__((always_inline)) {
    const Vec<C> s = score_of<C>(score, load<C>(z + i));
    store<C>(out + i, s);
    return s;
  });
}

// Whether a score is a function of its own logit that mean_prob divides by the sum over the experts.
inline bool is_elementwise(Score score) { return score == Score::sigmoid || score == Score::sqrtsoftplus; }

MOE_INLINE double power(double x, double p) {
  return p == 1 ? x : p == 2 ? x * x : p == 0.5 ? __builtin_sqrt(x) : __builtin_pow(x, p);
}
MOE_INLINE Vec<double> power(Vec<double> x, double p) {
  for (int i = 0; p != 1 && i < kLanes<double>; ++i) x[i] = power(x[i], p);
  return x;
}

// What the chosen scores of a token are divided by, or those of several tokens: score(k), k < count.
template <class F>
MOE_INLINE auto denominator(const RouteOptions& options, int64_t count, const F& score) {
  decltype(score(0)) sum{};
  switch (options.renormalize) {
    case Renormalize::none: return sum + 1;
    case Renormalize::pnorm:
      for (int64_t k = 0; k < count; ++k) {
        const auto s = score(k);
        sum += power(s < 0 ? -s : s, options.p);
      }
      return power(sum, 1 / options.p);
    default:
      for (int64_t k = 0; k < count; ++k) sum += score(k);
      if (options.renormalize == Renormalize::sum) return sum + options.eps;
      return sum < options.eps ? decltype(sum){} + options.eps : sum;
  }
}

}  // namespace moe::MOE_ISA
