// Measures the machine's roofs on torch's threads, all of them at once; multiply_adds and InOrder are work for others
// to time. Each thread times short pieces of its own work, so that on a busy machine most pieces are not interrupted
// and the figures are those of the machine and not of its load.
#include "cpu/roof.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/pages.h"

namespace moe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct alignas(64) Sink {
  double values[3] = {0.999, 0.001, 0};  // see isa/roof.h
};

// f(thread) on each of torch's threads.
template <class F>
void on_every_thread(const F& f) {
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(thread);
  });
}

// The sum over all threads of rate(thread).
template <class F>
double sum_over_threads(const F& rate) {
  std::vector<double> rates(torch::stable::get_num_threads());
  on_every_thread([&](int64_t thread) { rates[thread] = rate(thread); });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

constexpr int64_t kPieceBytes = 2 << 20;  // a fraction of a millisecond

double median(std::vector<double>& values) {
  const auto middle = values.begin() + values.size() / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// The median rate at which one thread moves pieces at rising offsets below `bytes`, again and again.
template <class F>
double median_rate(int64_t bytes, double seconds, const F& move) {
  std::vector<double> rates;
  const auto start = Clock::now();
  for (int64_t offset = 0; rates.empty() || seconds_since(start) < seconds; offset += kPieceBytes) {
    if (offset + kPieceBytes > bytes) offset = 0;
    const auto begin = Clock::now();
    move(offset / int64_t(sizeof(float)));
    rates.push_back(double(kPieceBytes) / seconds_since(begin));
  }
  return median(rates);
}

AlignedFloats new_buffer(int64_t bytes) {
  AlignedFloats buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
  ask_for_huge_pages(buffer.get(), bytes);
  return buffer;
}

AlignedFloats touched_buffer(int64_t bytes) {
  AlignedFloats buffer = new_buffer(bytes);
  std::memset(buffer.get(), 1, bytes);
  return buffer;
}

}  // namespace

double peak_arithmetic(Dtype dtype, double seconds) {
  constexpr double kPieceSeconds = 200e-6;
  const auto start = Clock::now();
  return sum_over_threads([&](int64_t) {
    Sink sink;
    std::vector<double> rates;
    int64_t rounds = 1 << 10;
    do {
      const auto begin = Clock::now();
      const double flops = kernels().roof_arithmetic(dtype, rounds, sink.values);
      const double taken = seconds_since(begin);
      if (flops == 0) return 0.0;
      if (taken < kPieceSeconds) rounds *= 2;
      else rates.push_back(flops / taken);
    } while (rates.empty() || seconds_since(start) < seconds);
    return median(rates);
  });
}

void multiply_adds(Dtype dtype, double flops) {
  Sink probe;
  double of_round = kernels().roof_arithmetic(dtype, 1, probe.values);
  if (of_round == 0) dtype = Dtype::float32, of_round = kernels().roof_arithmetic(dtype, 1, probe.values);
  const int64_t threads = torch::stable::get_num_threads(), rounds = int64_t(flops / of_round / double(threads));
  on_every_thread([&](int64_t) {
    Sink sink;
    kernels().roof_arithmetic(dtype, rounds, sink.values);
  });
}

Bandwidth peak_bandwidth(int64_t bytes, double seconds) {
  const int64_t share = std::max(bytes / int64_t(torch::stable::get_num_threads()), 8 * kPieceBytes);
  Bandwidth peak;
  peak.read = sum_over_threads([&](int64_t) {
    const AlignedFloats from = touched_buffer(share);  // by the thread that will read it, so that it lies near
    Sink sink;
    double best = 0;
    for (int streams : {2, 8})
      best = std::max(best, median_rate(share, seconds / 2, [&](int64_t i) {
                        kernels().roof_read(&from[i], kPieceBytes, streams, sink.values);
                      }));
    return best;
  });
  peak.copy = 2 * sum_over_threads([&](int64_t) {
                const AlignedFloats from = touched_buffer(share), to = touched_buffer(share);
                return median_rate(share, seconds,
                                   [&](int64_t i) { kernels().roof_move(&to[i], kPieceBytes, &from[i], kPieceBytes); });
              });
  return peak;
}

InOrder::InOrder(int64_t read, int64_t written) : read_(read), written_(written), from_(touched_buffer(read)) {}

void InOrder::run() const {
  const AlignedFloats to = new_buffer(written_);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t reads = read_ / (64 * threads) * 16, writes = written_ / (64 * threads) * 16;  // values of one thread
  on_every_thread([&](int64_t thread) {
    kernels().roof_move(&to[thread * writes], 4 * writes, &from_[thread * reads], 4 * reads);
  });
}

}  // namespace moe
