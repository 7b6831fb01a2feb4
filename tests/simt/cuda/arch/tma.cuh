// Boxes of a tensor to shared memory and back: loads hold poison until the barrier's phase completes, stores reach
// global memory at the wait.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/tensor_map.cuh"

namespace moe::arch {

enum class Keep : uint64_t { normal, shortly, long_ };

inline void prefetch(const TensorMap&) {}

// Nothing comes of it but a check of what may be asked for.
inline void prefetch_l2(const void* global, uint32_t bytes, simt::Where where = simt::Where::current()) {
  if (bytes % 16) simt::fail("a prefetch of a count that is no multiple of 16", where);
  simt::check_access("a prefetch", global, bytes, 16, where);
}

// Where a box lies: f(bytes from the tensor's start or -1 outside, offset in shared memory) for each 16 bytes.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#tensor-swizzling-modes
template <class F>
void every_chunk(const TensorBoxes& boxes, const int64_t (&at)[3], uint32_t shared, F f) {
  const int64_t chunk = 16 / boxes.element_bytes();
  for (int64_t z = 0; z < (boxes.rank == 3 ? boxes.box[2] : 1); ++z)
    for (int64_t y = 0; y < boxes.box[1]; ++y)
      for (int64_t x = 0; x < boxes.box[0]; x += chunk) {
        const bool inside = at[1] + y >= 0 && at[1] + y < int64_t(boxes.sizes[1]) && at[2] + z >= 0 &&
                            (boxes.rank == 2 || at[2] + z < int64_t(boxes.sizes[2]));
        int64_t from[8];
        for (int64_t i = 0; i < chunk; ++i)
          from[i] = inside && at[0] + x + i >= 0 && at[0] + x + i < int64_t(boxes.sizes[0])
                        ? (at[0] + x + i) * boxes.element_bytes() + (at[1] + y) * int64_t(boxes.stride_bytes[0]) +
                              (at[2] + z) * int64_t(boxes.rank == 3 ? boxes.stride_bytes[1] : 0)
                        : -1;
        uint32_t to = shared + uint32_t(((z * boxes.box[1] + y) * boxes.box[0] + x) * boxes.element_bytes());
        if (boxes.swizzled) to ^= (to >> 7 & 7) << 4;
        f(from, to);
      }
}

inline void expect_box(const TensorBoxes& boxes, int rank, const void* shared, const char* what, simt::Where where) {
  if (boxes.rank != rank)
    simt::fail(std::string(what) + " of " + std::to_string(rank) + " coordinates of a tensor of " +
                   std::to_string(boxes.rank) + " dimensions",
               where);
  if (!simt::Block::current->shared().holds(shared, size_t(boxes.box_bytes())))
    simt::fail(std::string(what) + " outside shared memory", where);
  simt::check_access(what, shared, size_t(boxes.box_bytes()), 128, where);
}

inline std::vector<unsigned char> read_box(const TensorBoxes& boxes, const int64_t (&at)[3], simt::Where where) {
  std::vector<unsigned char> data;
  const int64_t bytes = boxes.element_bytes();
  every_chunk(boxes, at, 0, [&](const int64_t* from, uint32_t) {
    unsigned char chunk[16] = {};
    for (int64_t i = 0; i < 16 / bytes; ++i) {
      if (from[i] < 0) continue;
      const auto* element = static_cast<const unsigned char*>(boxes.data) + from[i];
      simt::check_access("tma_load from global memory", element, size_t(bytes), size_t(bytes), where);
      std::memcpy(chunk + i * bytes, element, size_t(bytes));
    }
    data.insert(data.end(), chunk, chunk + 16);
  });
  return data;
}

inline void load_box(uint16_t blocks, int rank, void* shared, const TensorMap& map, Barrier& landed, int x, int y,
                     int z, simt::Where where) {
  simt::Block& own = *simt::Block::current;
  const TensorBoxes boxes = map.boxes;
  expect_box(boxes, rank, shared, "tma_load", where);
  const uint32_t to = shared_address(shared);
  simt::multicasts += std::popcount(blocks) > 1;
  for (unsigned target = 0; target < 16; ++target) {
    if (!(blocks >> target & 1)) continue;
    if (target >= own.cluster().size()) simt::fail("tma_load to a block that the cluster has not", where);
    simt::Block& block = own.cluster().block(target);
    if (block.finished()) simt::fail("tma_load to a block that has ended", where);
    if (!landed.machine(block, where).known_to_copies)
      simt::fail("tma_load with a barrier whose init no fence_barrier_init followed", where);
    block.async_proxy().poison(block.shared().data() + to, size_t(boxes.box_bytes()));
    own.later("tma_load", [boxes, x, y, z, to, &block, &landed, where] {
      const int64_t at[3] = {x, y, z};
      const auto land = [boxes, x, y, z, to, &block, data = read_box(boxes, at, where)] {
        size_t chunk = 0;
        const int64_t at[3] = {x, y, z};
        every_chunk(boxes, at, to, [&](const int64_t*, uint32_t to) {
          block.async_proxy().write(block.shared().data() + to, &data[16 * chunk++], 16);
        });
      };
      landed.land(block, boxes.box_bytes(), land, where);
    });
  }
}

inline uint16_t own_block() { return uint16_t(1u << simt::Block::current->rank()); }

inline void tma_load(void* shared, const TensorMap& map, Barrier& landed, int x, int y, Keep = Keep::normal,
                     simt::Where where = simt::Where::current()) {
  load_box(own_block(), 2, shared, map, landed, x, y, 0, where);
}
inline void tma_load(void* shared, const TensorMap& map, Barrier& landed, int x, int y, int z, Keep = Keep::normal,
                     simt::Where where = simt::Where::current()) {
  load_box(own_block(), 3, shared, map, landed, x, y, z, where);
}
inline void tma_load_to(uint16_t blocks, void* shared, const TensorMap& map, Barrier& landed, int x, int y,
                        Keep = Keep::normal, simt::Where where = simt::Where::current()) {
  load_box(blocks, 2, shared, map, landed, x, y, 0, where);
}
inline void tma_load_to(uint16_t blocks, void* shared, const TensorMap& map, Barrier& landed, int x, int y, int z,
                        Keep = Keep::normal, simt::Where where = simt::Where::current()) {
  load_box(blocks, 3, shared, map, landed, x, y, z, where);
}

inline void store_box(int rank, const TensorMap& map, const void* shared, int x, int y, int z, simt::Where where) {
  simt::Block& block = *simt::Block::current;
  const TensorBoxes boxes = map.boxes;
  expect_box(boxes, rank, shared, "tma_store", where);
  const auto* from = static_cast<const unsigned char*>(shared);
  std::vector<unsigned char> data(size_t(boxes.box_bytes()));
  block.async_proxy().read(data.data(), from, data.size(), "tma_store", where);
  const uint32_t start = shared_address(shared);
  block.thread().stores.store(
      {.changed = "shared memory was written while a tma_store may still read it",
       .unchanged = [from, data] { return std::memcmp(from, data.data(), data.size()) == 0; },
       .write =
           [boxes, x, y, z, start, data, where] {
             const int64_t at[3] = {x, y, z}, bytes = boxes.element_bytes();
             every_chunk(boxes, at, start, [&](const int64_t* to, uint32_t from) {
               for (int64_t i = 0; i < 16 / bytes; ++i) {
                 if (to[i] < 0) continue;
                 auto* element = static_cast<unsigned char*>(const_cast<void*>(boxes.data)) + to[i];
                 simt::check_access("tma_store to global memory", element, size_t(bytes), size_t(bytes), where);
                 std::memcpy(element, &data[from - start + size_t(i * bytes)], size_t(bytes));
               }
             });
           }});
}

inline void tma_store(const TensorMap& map, const void* shared, int x, int y,
                      simt::Where where = simt::Where::current()) {
  store_box(2, map, shared, x, y, 0, where);
}
inline void tma_store(const TensorMap& map, const void* shared, int x, int y, int z,
                      simt::Where where = simt::Where::current()) {
  store_box(3, map, shared, x, y, z, where);
}

inline void tma_commit() { simt::Block::current->thread().stores.commit(); }

// The stores end beside the threads, so that others may do before what they must not.
inline void wait_for_stores(simt::Where where) {
  simt::Block& block = *simt::Block::current;
  simt::ThreadSet waiting;
  bool ended = false;
  block.later("tma_store", [&] {
    ended = true;
    block.wake(waiting);
  });
  while (!ended) block.wait_in(waiting, "tma_wait", where);
}

template <int pending>
void tma_wait_read(simt::Where where = simt::Where::current()) {
  wait_for_stores(where);
  simt::Block::current->thread().stores.wait_read(pending, where);
}

template <int pending>
void tma_wait(simt::Where where = simt::Where::current()) {
  wait_for_stores(where);
  simt::Block::current->thread().stores.wait(pending, where);
}

}  // namespace moe::arch
