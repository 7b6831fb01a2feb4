// route and its backward on torch's threads. Statistics are sums over tokens: each chunk of tokens has partial sums of
// its own, added up in the order of the chunks. How tokens are cut into chunks depends on shapes alone, so the results
// do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "cpu/device.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace moe {
namespace {

constexpr int64_t kPartialBytes = int64_t(64) << 20;

struct Chunks {
  int64_t tokens, count, size;

  // As many as pay for `bytes` of partial sums each, which cost about as much as `rows` tokens.
  Chunks(int64_t tokens, int64_t rows, int64_t bytes) : tokens(tokens) {
    const int64_t useful = std::min(tokens / 32, 4 * tokens / std::max<int64_t>(rows, 1));
    const int64_t wanted = std::min({useful, kPartialBytes / std::max<int64_t>(bytes, 1), int64_t(64)});
    size = std::max<int64_t>(ceil_div(tokens, std::max<int64_t>(wanted, 1)), 1);
    count = ceil_div(tokens, size);
  }

  template <class F>
  void run(F f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) f(chunk, chunk * size, std::min(tokens, (chunk + 1) * size));
    });
  }
};

// [S]
std::vector<int64_t> count_tokens(const int32_t* segments, int64_t num_segments, int64_t tokens) {
  std::vector<int64_t> counts(num_segments);
  if (!segments && num_segments > 0) counts[0] = tokens;
  for (int64_t t = 0; segments && t < tokens; ++t)
    if (segments[t] >= 0 && segments[t] < num_segments) ++counts[segments[t]];
  return counts;
}

template <class C>
void route_with_statistics(const RouteParams& p, const Kernels& isa) {
  const int64_t cells = p.num_segments * p.experts;
  const Chunks chunks(p.tokens, p.num_segments, cells * int64_t(sizeof(int32_t) + sizeof(double)));
  std::vector<int32_t> counts(chunks.count * cells);
  std::vector<double> prob(chunks.count * cells);
  chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
    isa.route(p, begin, end, counts.data() + chunk * cells, prob.data() + chunk * cells);
  });

  const auto tokens = count_tokens(p.segments, p.num_segments, p.tokens);
  for_each_range(cells, chunks.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t count = 0;
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        count += counts[chunk * cells + i];
        sum += prob[chunk * cells + i];
      }
      p.counts[i] = count;
      static_cast<C*>(p.mean_prob)[i] = C(sum / double(std::max<int64_t>(tokens[i / p.experts], 1)));
    }
  });
}

template <class C>
void add_up(const std::vector<double>& partial, int64_t count, int64_t experts, void* out) {
  for (int64_t e = 0; e < experts; ++e) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < count; ++chunk) sum += partial[chunk * experts + e];
    static_cast<C*>(out)[e] = C(sum);
  }
}

}  // namespace

void route(const RouteParams& p, const Device&) {
  const Kernels& isa = kernels();
  if (!p.counts) {
    for_each_range(p.tokens, p.experts,
                   [&](int64_t begin, int64_t end) { isa.route(p, begin, end, nullptr, nullptr); });
  } else if (p.logits.dtype == Dtype::float64) {
    route_with_statistics<double>(p, isa);
  } else {
    route_with_statistics<float>(p, isa);
  }
}

void route_backward(const RouteBackwardParams& p, const Device&) {
  const Kernels& isa = kernels();
  const auto tokens = count_tokens(p.segments, p.num_segments, p.tokens);
  if (!p.expert_scale) {
    for_each_range(p.tokens, p.experts,
                   [&](int64_t begin, int64_t end) { isa.route_backward(p, begin, end, tokens.data(), nullptr); });
    return;
  }
  const Chunks chunks(p.tokens, 1, p.experts * int64_t(sizeof(double)));
  std::vector<double> partial(chunks.count * p.experts);
  chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
    isa.route_backward(p, begin, end, tokens.data(), partial.data() + chunk * p.experts);
  });
  if (p.logits.dtype == Dtype::float64) add_up<double>(partial, chunks.count, p.experts, p.grad_expert_scale);
  else add_up<float>(partial, chunks.count, p.experts, p.grad_expert_scale);
}

}  // namespace moe
