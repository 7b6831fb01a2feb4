// Work on torch's threads: ranges of equal elements, or pieces that may differ in size.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace moe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(begin, end) over ranges that make up 0..n-1. An element is work on `values` numbers; a range has elements enough to
// be worth a thread.
template <class F>
void for_each_range(int64_t n, int64_t values, const F& f) {
  constexpr int64_t kWorthAThread = 16 * 1024;
  torch::stable::parallel_for(0, n, 1 + kWorthAThread / (1 + values), f);
}

// f(i) for i in 0..n-1, each by whichever thread is free: pieces of work may differ in size, and no result may depend
// on which thread computed it. `cost` is a piece's work in multiply-adds or bytes: little work stays on the calling
// thread.
template <class F>
void for_each_piece(int64_t n, double cost, const F& f) {
  constexpr double kWorthAThread = 1 << 17;
  const int64_t threads =
      std::min({n, int64_t(torch::stable::get_num_threads()), std::max<int64_t>(1, int64_t(n * cost / kWorthAThread))});
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) f(i);
  });
}

}  // namespace moe
