// One token's logits, shared out to a team: thread r has quads r, r + size, r + 2 size ... of four neighbours, so that
// how a sum is formed depends neither on the dtype nor on the alignment. Padding is -inf, which adds nothing to a sum.
#pragma once

#include "cuda/kernels/rank.cuh"
#include "cuda/kernels/values.cuh"
#include "stages/params.h"

namespace moe {

template <class T>
__device__ __forceinline__ Quad load_quad(const T* row, int64_t first, int64_t count, bool aligned) {
  const auto values = load_values<T, 4>(row + first, count - first, aligned, -kInfinity);
  Quad out;
  for (int i = 0; i < 4; ++i) out[i] = to_float(values[i]);
  return out;
}

template <class T>
__device__ __forceinline__ void store_quad(T* row, int64_t first, int64_t count, bool aligned, const Quad& values) {
  arch::Pack<T, 4> out;
  for (int i = 0; i < 4; ++i) out[i] = from_float<T>(values[i]);
  store_values(row + first, out, count - first, aligned);
}

// One logit, before the softcap.
__device__ __forceinline__ float read(const Matrix& from, int64_t row, int64_t column) {
  float value = 0;
  with_type(from.dtype, [&](auto zero) {
    value = to_float(static_cast<const decltype(zero)*>(from.data)[row * from.stride + column]);
  });
  return value;
}

// z = cap * tanh(logit / cap). Rows hold the tangent, whose square is wanted for the slope.
struct Softcap {
  float cap;  // 0: none

  __device__ explicit Softcap(double softcap) : cap(fabsf(float(softcap))) {}
  __device__ float tangent(float logit) const { return cap != 0 ? tanhf(logit / cap) : logit; }
  __device__ float z(float tangent) const { return cap != 0 ? tangent * cap : tangent; }
  __device__ float slope(float tangent) const { return cap != 0 ? 1 - tangent * tangent : 1; }
};

// Blocks of 128 threads that a processor holds at once: registers enough for a row, so that none are spilled.
constexpr int blocks_per_processor(int quads) { return quads == 1 ? 6 : quads == 2 ? 5 : quads == 4 ? 3 : 2; }

// Held in registers.
template <int kQuads>
class ShortRow {
 public:
  static constexpr int kValues = 4 * kQuads;

  __device__ ShortRow(const LaneTeam& team, int64_t experts, double softcap)
      : experts_(int(experts)), first_(4 * team.rank), step_(4 * team.size), softcap_(softcap) {}

  __device__ int id(int i) const { return first_ + i / 4 * step_ + i % 4; }

  // The logits themselves, until cap() is called.
  __device__ void load(const Matrix& from, int64_t token, bool aligned) {
    with_type(from.dtype, [&](auto zero) {
      const auto* row = static_cast<const decltype(zero)*>(from.data) + token * from.stride;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) quads_[q] = load_quad(row, id(4 * q), experts_, aligned);
    });
  }

  __device__ void cap() {
    if (softcap_.cap == 0) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (id(i) < experts_) value(i) = softcap_.tangent(value(i));
  }

  // Before cap().
  __device__ float logit(int i) const { return quads_[i / 4][i % 4]; }

  // f(z, id, i) for this thread's values, i = 0 .. kValues - 1.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) f(softcap_.z(quads_[i / 4][i % 4]), id(i), i);
  }

  // This thread's part of the sum of f(z, id): of quads in float32, of those in float64, so that its error does not
  // grow with the number of experts.
  template <class F>
  __device__ __forceinline__ double sum(const F& f) const {
    double total = 0;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      auto value = [&](int i) { return f(softcap_.z(quads_[q][i]), id(4 * q) + i); };
      total += double((value(0) + value(1)) + (value(2) + value(3)));
    }
    return total;
  }

  // Writes f(z, slope, id) of each quad.
  template <class F>
  __device__ __forceinline__ void write(const Matrix& to, int64_t token, bool aligned, const F& f) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      Quad z, slope;
      for (int i = 0; i < 4; ++i) z[i] = softcap_.z(quads_[q][i]), slope[i] = softcap_.slope(quads_[q][i]);
      const Quad out = f(z, slope, id(4 * q));
      with_type(to.dtype, [&](auto zero) {
        auto* row = static_cast<decltype(zero)*>(to.data) + token * to.stride;
        store_quad(row, id(4 * q), experts_, aligned, out);
      });
    }
  }

 private:
  __device__ float& value(int i) { return quads_[i / 4][i % 4]; }

  int experts_, first_, step_;
  Softcap softcap_;
  Quad quads_[kQuads];
};

// Read from memory again wherever it is used.
class LongRow {
 public:
  __device__ LongRow(const BlockTeam& team, const Matrix& logits, int64_t token, int64_t experts, double softcap,
                     bool aligned)
      : logits_(logits),
        token_(token),
        experts_(experts),
        first_(4 * int64_t(team.rank)),
        step_(4 * int64_t(team.size)),
        aligned_(aligned),
        softcap_(softcap) {}

  // f(z, id, logit)
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t first = first_; first < experts_; first += step_) {
      const Quad logits = load(first);
      for (int i = 0; i < 4; ++i)
        f(first + i < experts_ ? softcap_.z(softcap_.tangent(logits[i])) : -kInfinity, int(first) + i, logits[i]);
    }
  }

  template <class F>
  __device__ __forceinline__ double sum(const F& f) const {
    double total = 0;
    each([&](float z, int id, float) { total += double(f(z, id)); });
    return total;
  }

  template <class F>
  __device__ __forceinline__ void write(const Matrix& to, int64_t token, bool aligned, const F& f) const {
    for (int64_t first = first_; first < experts_; first += step_) {
      const Quad logits = load(first);
      Quad z, slope;
      for (int i = 0; i < 4; ++i) {
        const float tangent = softcap_.tangent(logits[i]);
        z[i] = first + i < experts_ ? softcap_.z(tangent) : -kInfinity, slope[i] = softcap_.slope(tangent);
      }
      const Quad out = f(z, slope, int(first));
      with_type(to.dtype, [&](auto zero) {
        auto* row = static_cast<decltype(zero)*>(to.data) + token * to.stride;
        store_quad(row, first, experts_, aligned, out);
      });
    }
  }

 private:
  __device__ Quad load(int64_t first) const {
    Quad out;
    with_type(logits_.dtype, [&](auto zero) {
      const auto* row = static_cast<const decltype(zero)*>(logits_.data) + token_ * logits_.stride;
      out = load_quad(row, first, experts_, aligned_);
    });
    return out;
  }

  const Matrix& logits_;
  int64_t token_, experts_, first_, step_;
  bool aligned_;
  Softcap softcap_;
};

}  // namespace moe
