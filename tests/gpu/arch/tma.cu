// Boxes of a tensor to shared memory and back: swizzled and not, beyond the tensor's edges, to several blocks.
#include "cuda/arch/tma.cuh"

#include "check.h"
#include "cuda/arch/cluster.cuh"
#include "cuda/arch/proxy.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/launch/tensor_map.h"

namespace moe {
namespace {

constexpr int kBytes = 4096;  // of the largest box

struct TmaShared {
  alignas(1024) unsigned char box[kBytes];
  arch::Barrier landed;
};

struct Place {
  int rank, x, y, z, bytes;
};

// The box's bytes as they lie in shared memory. Every block of a cluster gets those that block 0 loads for all.
template <bool to_all>
__global__ void load_box(const __grid_constant__ arch::TensorMap map, const __grid_constant__ Place at,
                         unsigned char* out) {
  auto& shared = arch::shared<TmaShared>();
  if (threadIdx.x == 0) {
    arch::prefetch(map);
    shared.landed.init(1);
    arch::fence_barrier_init();
  }
  arch::sync_cluster();
  if (threadIdx.x == 0) {
    shared.landed.arrive_expect_bytes(uint32_t(at.bytes));
    if constexpr (to_all) {
      const auto all = uint16_t((1 << arch::blocks_in_cluster()) - 1);
      if (arch::block_in_cluster() > 0) {
      } else if (at.rank == 2) {
        arch::tma_load_to(all, shared.box, map, shared.landed, at.x, at.y, arch::Keep::long_);
      } else {
        arch::tma_load_to(all, shared.box, map, shared.landed, at.x, at.y, at.z);
      }
    } else if (at.rank == 2) {
      arch::tma_load(shared.box, map, shared.landed, at.x, at.y);
    } else {
      arch::tma_load(shared.box, map, shared.landed, at.x, at.y, at.z, arch::Keep::shortly);
    }
  }
  shared.landed.wait(0);
  for (int i = int(threadIdx.x); i < at.bytes; i += int(blockDim.x))
    out[int(blockIdx.x) * at.bytes + i] = shared.box[i];
  arch::sync_cluster();
}

__global__ void store_box(const __grid_constant__ arch::TensorMap map, const __grid_constant__ Place at,
                          const unsigned char* in) {
  auto& shared = arch::shared<TmaShared>();
  for (int i = int(threadIdx.x) * 4; i < at.bytes; i += int(blockDim.x) * 4)
    for (int j = 0; j < 4; ++j) shared.box[i + j] = in[i + j];
  arch::fence_async_proxy();
  arch::sync_block();
  if (threadIdx.x == 0) {
    if (at.rank == 2) arch::tma_store(map, shared.box, at.x, at.y);
    else arch::tma_store(map, shared.box, at.x, at.y, at.z);
    arch::tma_commit();
    arch::tma_wait_read<0>();
    arch::tma_wait<0>();
  }
}

// The element of the tensor that lies in each place of the box in shared memory, or -1.
std::vector<int> elements_of_box(const BoxedTensor& tensor, const Place& at) {
  const int box_z = tensor.rank == 3 ? tensor.box[2] : 1;
  const int bytes = tensor.dtype == Dtype::float32 ? 4 : 2, chunk = 16 / bytes;
  std::vector<int> elements(size_t(tensor.box[0] * tensor.box[1] * box_z), -1);
  for (int z = 0; z < box_z; ++z)
    for (int y = 0; y < tensor.box[1]; ++y)
      for (int x = 0; x < tensor.box[0]; ++x) {
        const int64_t index[3] = {at.x + x, at.y + y, at.z + z};
        bool inside = true;
        for (int i = 0; i < tensor.rank; ++i) inside &= index[i] >= 0 && index[i] < tensor.sizes[size_t(i)];
        const int row = z * tensor.box[1] + y;
        const int column = tensor.swizzled ? ((x / chunk) ^ row % 8) * chunk + x % chunk : x;
        if (inside)
          elements[size_t(row * tensor.box[0] + column)] =
              int(index[0] + index[1] * tensor.strides[0] + (tensor.rank == 3 ? index[2] * tensor.strides[1] : 0));
      }
  return elements;
}

template <class T>
bool check_box(const std::string& what, BoxedTensor tensor, Place at, unsigned blocks = 1) {
  const Device device;
  const int64_t last = tensor.rank == 3 ? tensor.strides[1] * tensor.sizes[2] : tensor.strides[0] * tensor.sizes[1];
  const auto values = whole_numbers<T>(int(last));
  const T* there = put(device, values);
  tensor.data = there;
  const std::vector<int> elements = elements_of_box(tensor, at);
  const int count = int(elements.size());
  at.rank = tensor.rank, at.bytes = count * int(sizeof(T));
  const arch::TensorMap map = tensor_map(tensor, "check");

  auto* out = put(device, std::vector<T>(size_t(count) * blocks));
  launch({.grid = dim3(blocks),
          .block = dim3(64),
          .shared_bytes = sizeof(TmaShared),
          .stream = device.stream(),
          .cluster = blocks},
         blocks > 1 ? load_box<true> : load_box<false>, map, at, reinterpret_cast<unsigned char*>(out));
  std::vector<T> expected;
  for (unsigned block = 0; block < blocks; ++block)
    for (int element : elements) expected.push_back(element < 0 ? T(0.0f) : values[size_t(element)]);
  if (!expect_equal("tma_load" + what, fetch(device, out, count * int(blocks)), expected)) return false;

  const auto stored = whole_numbers<T>(count);
  launch({.grid = dim3(1), .block = dim3(64), .shared_bytes = sizeof(TmaShared), .stream = device.stream()}, store_box,
         map, at, reinterpret_cast<const unsigned char*>(put(device, stored)));
  expected = values;
  for (int i = 0; i < count; ++i)
    if (elements[size_t(i)] >= 0) expected[size_t(elements[size_t(i)])] = stored[size_t(i)];
  return expect_equal("tma_store" + what, fetch(device, there, int(last)), expected);
}

}  // namespace
}  // namespace moe

int main() {
  using moe::Dtype;
  const moe::BoxedTensor two{.data = nullptr,
                             .dtype = Dtype::bfloat16,
                             .rank = 2,
                             .sizes = {100, 37, 1},
                             .strides = {104, 0},
                             .box = {64, 16, 1}};
  const moe::BoxedTensor three{.data = nullptr,
                               .dtype = Dtype::float16,
                               .rank = 3,
                               .sizes = {72, 5, 3},
                               .strides = {80, 480},
                               .box = {64, 4, 2}};
  moe::BoxedTensor flat = two, floats = three, narrow = three;
  flat.swizzled = false, flat.box = {40, 16, 1};
  floats.dtype = Dtype::float32, floats.box = {32, 4, 2};
  narrow.swizzled = false, narrow.box = {8, 3, 2};
  bool right = moe::check_box<__nv_bfloat16>(" inside", two, {.x = 8, .y = 3});
  right &= moe::check_box<__nv_bfloat16>(" beyond the end", two, {.x = 64, .y = 32});
  right &= moe::check_box<__nv_bfloat16>(" before the start", two, {.x = -16, .y = -5});
  right &= moe::check_box<__nv_bfloat16>(" outside", two, {.x = 0, .y = 40});
  right &= moe::check_box<__nv_bfloat16>(" unswizzled", flat, {.x = 80, .y = 30});
  right &= moe::check_box<__half>(" of three dimensions", three, {.x = 16, .y = 2, .z = 2});
  right &= moe::check_box<float>(" of floats", floats, {.x = 48, .y = -1, .z = 1});
  right &= moe::check_box<__half>(" narrow", narrow, {.x = 66, .y = 1, .z = -1});
  right &= moe::check_box<__nv_bfloat16>(" to two blocks", two, {.x = 64, .y = 30}, 2);
  right &= moe::check_box<__half>(" to four blocks", three, {.x = 16, .y = 2, .z = 2}, 4);
  return right ? 0 : 1;
}
