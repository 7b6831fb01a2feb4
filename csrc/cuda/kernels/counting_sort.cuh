// A stable counting sort of slots by expert, with a limit of rows per expert.
//
// The slots are cut into tiles, one for each block. A tile counts its experts; a scan over the tiles tells each one how
// many slots of every expert come before it; a tile then places its slots. Inside a tile a warp owns consecutive slots,
// 32 at a time: the lanes of one expert find each other by match, and their number among them, added to what the warps
// and tiles before have counted, is the slot's rank in its expert. Ranks from the capacity on are dropped; dropped
// slots and ids of no expert follow behind all rows, in slot order.
//
// Counts of a window of experts lie in shared memory; with more experts the tile is walked once for each window.
#pragma once

#include "cuda/arch/warp.cuh"
#include "cuda/kernels/plan_shared.cuh"

namespace moe {

struct CountingSort {
  const void* experts;  // [slots] int32 or int64, by slot
  bool experts_are_int64;
  int32_t slots, num_experts, capacity;
  int32_t step = 1;  // ranks go by number of slot, or first by slot % step: all first choices before second ones
  int32_t tile_slots;

  int32_t* tile_counts = nullptr;  // [tiles, E], then the slots of the tiles before; null: there is one tile
  int32_t* totals;                 // [E], before drops

  // Results, null where not wanted.
  int32_t* offsets = nullptr;   // [E + 1]
  int32_t* counts = nullptr;    // [E], after drops; may be totals
  int32_t* row_slot = nullptr;  // [slots]; those of dropped slots are written along with slot_row
  int32_t* slot_row = nullptr;  // [slots]
  int32_t* kept = nullptr;      // [slots], the expert, -1 where dropped

  __device__ int32_t slot_at(int64_t place) const {
    const uint32_t i = uint32_t(place), tokens = uint32_t(slots) / uint32_t(step);
    return int32_t(step == 1 ? i : i % tokens * uint32_t(step) + i / tokens);
  }
  __device__ int32_t expert_of(int32_t slot) const {
    const int64_t id =
        experts_are_int64 ? static_cast<const int64_t*>(experts)[slot] : static_cast<const int32_t*>(experts)[slot];
    return id >= 0 && id < num_experts ? int32_t(id) : -1;
  }
};

// The part of a chunk that one thread has: slots `at(0)`, `at(1)` ..., 32 apart.
struct SortChunk {
  int64_t begin, end;
  int32_t expert[kPlanSteps];
  uint32_t peers[kPlanSteps];  // the lanes whose slots have the same expert

  __device__ SortChunk(const CountingSort& sort, int64_t begin, int64_t tile_end)
      : begin(begin + warp_id() * 32 * kPlanSteps + arch::lane_id()), end(tile_end) {
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) expert[i] = at(i) < end ? sort.expert_of(sort.slot_at(at(i))) : -1;
  }
  __device__ int64_t at(int i) const { return begin + 32 * i; }

  // Adds the slots of the experts first .. first + width to the counts of this warp.
  __device__ void count(PlanShared& shared, int32_t first, int32_t width) {
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) peers[i] = count_lanes(shared.counts[warp_id()], expert[i] - first, width);
  }
};

// out[e] = slots of expert e in begin..end.
__device__ inline void count_tile(const CountingSort& sort, PlanShared& shared, int64_t begin, int64_t end,
                                  int32_t* out) {
  for (int64_t window = 0; window < sort.num_experts; window += kPlanWindow) {
    const int32_t first = int32_t(window), width = min(kPlanWindow, sort.num_experts - first);
    clear_counts(shared, width);
    for (int64_t at = begin; at < end; at += kPlanChunk) SortChunk(sort, at, end).count(shared, first, width);
    arch::sync_block();  // all warps have counted
    for (int32_t e = int32_t(threadIdx.x); e < width; e += kPlanThreads) {
      int32_t total = 0;
      for (int warp = 0; warp < kPlanWarps; ++warp) total += shared.counts[warp][e];
      out[first + e] = total;
    }
    arch::sync_block();  // the counts are read, and what is written may be read by the block
  }
}

// What place_tile has learnt about all rows.
struct PlacedRows {
  int32_t kept = 0;         // of all tiles
  int32_t kept_before = 0;  // of the tiles before, this thread's part of the sum
};

// Where the rows of a window of experts begin, and how many slots of each come before the tile.
__device__ inline void begin_window(const CountingSort& sort, PlanShared& shared, int64_t tile, int32_t first,
                                    PlacedRows& rows) {
  const int32_t mine = int32_t(threadIdx.x) * kPlanPerThread;
  int32_t kept[kPlanPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPlanPerThread; ++i) {
    const int64_t e = int64_t(first) + mine + i;
    sum += kept[i] = e < sort.num_experts ? min(sort.totals[e], sort.capacity) : 0;
  }
  const Scanned scanned = scan_block(shared, sum);  // and every warp has left the window before
  int32_t offset = rows.kept + scanned.before;
  rows.kept += scanned.all;
#pragma unroll
  for (int i = 0; i < kPlanPerThread; ++i) {
    const int64_t e = int64_t(first) + mine + i;
    if (e >= sort.num_experts) continue;
    const int32_t before = sort.tile_counts ? sort.tile_counts[tile * sort.num_experts + e] : 0;
    rows.kept_before += min(before, sort.capacity);
    shared.before[mine + i] = before;
    shared.offset[mine + i] = offset;
    offset += kept[i];
    if (tile != 0) continue;
    if (sort.offsets) sort.offsets[e + 1] = offset;
    if (sort.counts) sort.counts[e] = kept[i];
  }
}

// The warps' counts of a chunk become the ranks at which they go on.
__device__ inline void scan_warps(PlanShared& shared, int32_t width) {
  for (int i = 0; i < kPlanPerThread; ++i) {
    const int32_t e = int32_t(threadIdx.x) * kPlanPerThread + i;
    if (e >= width) return;
    int32_t before = shared.before[e];
    for (int warp = 0; warp < kPlanWarps; ++warp) {
      const int32_t count = shared.counts[warp][e];
      shared.counts[warp][e] = before;
      before += count;
    }
    shared.before[e] = before;
  }
}

__device__ __forceinline__ void place_chunk(const CountingSort& sort, PlanShared& shared, const SortChunk& chunk,
                                            int32_t first, int32_t width) {
#pragma unroll
  for (int i = 0; i < kPlanSteps; ++i) {
    const int32_t expert = chunk.expert[i], e = expert - first;
    const bool inside = expert >= first && e < width;
    int32_t rank = 0;
    if (inside) rank = shared.counts[warp_id()][e] + arch::count_bits(chunk.peers[i] & lanes_below());
    arch::sync_warp();  // the counts are read
    if (inside && arch::lane_id() == arch::lowest_bit(chunk.peers[i]))
      shared.counts[warp_id()][e] += arch::count_bits(chunk.peers[i]);
    arch::sync_warp();  // and written

    const bool no_expert = expert < 0 && first == 0;
    if (chunk.at(i) >= chunk.end || !(inside || no_expert)) continue;
    const int32_t slot = sort.slot_at(chunk.at(i));
    const bool kept = inside && rank < sort.capacity;
    const int32_t row = kept ? shared.offset[e] + rank : -1;
    if (kept && sort.row_slot) sort.row_slot[row] = slot;
    if (sort.slot_row) sort.slot_row[slot] = row;
    if (sort.kept) sort.kept[slot] = kept ? expert : -1;
  }
}

// The slots that have got no row, behind all that have.
__device__ inline void place_dropped(const CountingSort& sort, PlanShared& shared, int64_t begin, int64_t end,
                                     const PlacedRows& rows) {
  int64_t row = rows.kept + begin - scan_block(shared, rows.kept_before).all;
  for (; begin < end; begin += kPlanChunk) {
    uint32_t dropped[kPlanSteps];
    int32_t count = 0;
    const int64_t at = begin + warp_id() * 32 * kPlanSteps + arch::lane_id();
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) {
      dropped[i] = arch::ballot(at + 32 * i < end && sort.slot_row[at + 32 * i] < 0);
      count += arch::count_bits(dropped[i]);
    }
    const Scanned scanned = scan_block(shared, arch::lane_id() == 0 ? count : 0);
    int64_t next = row + arch::shuffle(scanned.before, 0);
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) {
      if (dropped[i] >> arch::lane_id() & 1)
        sort.row_slot[next + arch::count_bits(dropped[i] & lanes_below())] = int32_t(at + 32 * i);
      next += arch::count_bits(dropped[i]);
    }
    row += scanned.all;
  }
}

__device__ inline void place_tile(const CountingSort& sort, PlanShared& shared, int64_t tile, int64_t begin,
                                  int64_t end) {
  PlacedRows rows;
  if (tile == 0 && threadIdx.x == 0 && sort.offsets) sort.offsets[0] = 0;
  for (int64_t window = 0; window < sort.num_experts; window += kPlanWindow) {
    const int32_t first = int32_t(window), width = min(kPlanWindow, sort.num_experts - first);
    begin_window(sort, shared, tile, first, rows);
    for (int64_t at = begin; at < end; at += kPlanChunk) {
      SortChunk chunk(sort, at, end);
      clear_counts(shared, width);
      chunk.count(shared, first, width);
      arch::sync_block();  // all warps have counted
      scan_warps(shared, width);
      arch::sync_block();  // all ranks are known
      place_chunk(sort, shared, chunk, first, width);
    }
  }
  if (sort.slot_row && rows.kept < sort.slots) place_dropped(sort, shared, begin, end, rows);
}

}  // namespace moe
