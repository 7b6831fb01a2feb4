// wgmma of every width, both types and every majorness, from shared memory that threads have filled.
#include "cuda/arch/wgmma.cuh"

#include "check.h"
#include "cuda/arch/proxy.cuh"
#include "cuda/arch/warp.cuh"

namespace moe {
namespace {

constexpr int kDepth = 64;

// [rows, 64] of 2-byte elements, the 16-byte chunks of each row where a 128-byte swizzle has them.
template <class T, int rows>
struct alignas(1024) Rows {
  T elements[rows * 64];

  __device__ T& at(int row, int column) { return elements[row * 64 + ((column / 8) ^ row % 8) * 8 + column % 8]; }
};

// From [count, kDepth]. Rows along K are [count, 64]; rows along M or N come in panels [64 of K, 64].
template <bool across, class T, int rows>
__device__ void fill(Rows<T, rows>& to, const T* from, int count) {
  for (int i = int(threadIdx.x) * 2; i < count * kDepth; i += 256)
    for (int j = i; j < i + 2; ++j) {
      const int row = j / 64, column = j % 64;
      to.at(row, column) =
          across ? from[(row / kDepth * 64 + column) * kDepth + row % kDepth] : from[row * kDepth + column];
    }
}

template <class T, int n>
struct WgmmaShared {
  Rows<T, 64> a;
  Rows<T, n> b;
};

template <class T, int n, bool a_across, bool b_across>
__global__ __launch_bounds__(128) void multiply(const T* a, const T* b, float* d) {
  auto& shared = arch::shared<WgmmaShared<T, n>>();
  fill<a_across>(shared.a, a, 64);
  fill<b_across>(shared.b, b, n);
  arch::fence_async_proxy();
  arch::sync_block();

  const uint64_t of_a = a_across ? arch::wgmma_across_k(&shared.a, kDepth * 128) : arch::wgmma_along_k(&shared.a);
  const uint64_t of_b = b_across ? arch::wgmma_across_k(&shared.b, kDepth * 128) : arch::wgmma_along_k(&shared.b);
  float sum[n / 2];
  for (int i = 0; i < n / 2; ++i) sum[i] = 1e6f;  // the first product does not accumulate
  arch::wgmma_hold(sum);
  arch::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    arch::wgmma<T, n, a_across, b_across>(sum, arch::wgmma_advance(of_a, step * (a_across ? 2048 : 32)),
                                          arch::wgmma_advance(of_b, step * (b_across ? 2048 : 32)), step > 0);
  }
  arch::wgmma_commit();
  arch::wgmma_wait<0>();
  arch::wgmma_hold(sum);
  const int row = int(threadIdx.x) / 32 * 16 + arch::lane_id() / 4, column = arch::lane_id() % 4 * 2;
  for (int i = 0; i < n / 2; ++i) d[(row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2] = sum[i];
}

template <class T, int n, class Kernel>
bool check_products(const std::string& what, Kernel kernel) {
  const Device device;
  const auto a = whole_numbers<T>(64 * kDepth), b = whole_numbers<T>(n * kDepth);
  float* d = put(device, std::vector<float>(64 * n));
  launch({.grid = dim3(1), .block = dim3(128), .shared_bytes = sizeof(WgmmaShared<T, n>), .stream = device.stream()},
         kernel, put(device, a), put(device, b), d);
  std::vector<float> expected(64 * n);
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < n; ++column)
      for (int k = 0; k < kDepth; ++k)
        expected[size_t(row * n + column)] +=
            float(a[size_t(row * kDepth + k)]) * float(b[size_t(column * kDepth + k)]);
  return expect_equal("wgmma, n " + std::to_string(n) + what, fetch(device, d, 64 * n), expected);
}

template <class T, int n>
bool check_width() {
  bool right = check_products<T, n>("", multiply<T, n, false, false>);
  right &= check_products<T, n>(", a across", multiply<T, n, true, false>);
  right &= check_products<T, n>(", b across", multiply<T, n, false, true>);
  right &= check_products<T, n>(", both across", multiply<T, n, true, true>);
  return right;
}

template <class T>
bool check_type() {
  bool right = check_width<T, 64>();
  right &= check_width<T, 128>();
  right &= check_width<T, 256>();
  return right;
}

}  // namespace
}  // namespace moe

int main() {
  bool right = moe::check_type<__nv_bfloat16>();
  right &= moe::check_type<__half>();
  return right ? 0 : 1;
}
