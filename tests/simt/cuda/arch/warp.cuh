// What the lanes of a warp say to each other, on the emulator.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <functional>

#include "machine/schedule.h"

namespace moe::arch {

inline constexpr uint32_t kAllLanes = 0xffffffff;

inline int lane_id() { return int(threadIdx.x % 32); }

// Each lane gets the value of the lane it names; outside the warp, its own.
template <class T>
T exchange(const char* instruction, T value, int source, uint32_t lanes, simt::Where where) {
  struct Args {
    T value, got;
    int source;
    simt::Where where;
  } args{value, value, source, where};
  simt::Block::current->together<Args>(
      instruction, lanes, args,
      [](const simt::Lanes<Args>& all) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (!all.has(lane)) continue;
          const int source = all[lane].source;
          if (source < 0 || source > 31) continue;
          if (!all.has(unsigned(source)))
            simt::fail("a shuffle reads lane " + std::to_string(source) + ", which takes no part", all[lane].where);
          all[lane].got = all[unsigned(source)].value;
        }
      },
      where);
  return args.got;
}

template <class T>
T shuffle(T value, int source, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  return exchange("shuffle", value, source & 31, lanes, where);
}

template <class T>
T shuffle_xor(T value, int distance, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  return exchange("shuffle_xor", value, lane_id() ^ distance, lanes, where);
}

template <class T>
T shuffle_up(T value, int distance, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  return exchange("shuffle_up", value, lane_id() - distance, lanes, where);
}

inline uint32_t ballot(bool predicate, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  struct Args {
    bool predicate;
    uint32_t got;
  } args{predicate, 0};
  simt::Block::current->together<Args>(
      "ballot", lanes, args,
      [](const simt::Lanes<Args>& all) {
        uint32_t bits = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
          if (all.has(lane) && all[lane].predicate) bits |= 1u << lane;
        for (unsigned lane = 0; lane < 32; ++lane)
          if (all.has(lane)) all[lane].got = bits;
      },
      where);
  return args.got;
}

inline uint32_t match(int32_t value, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  struct Args {
    int32_t value;
    uint32_t got;
  } args{value, 0};
  simt::Block::current->together<Args>(
      "match", lanes, args,
      [](const simt::Lanes<Args>& all) {
        for (unsigned lane = 0; lane < 32; ++lane)
          for (unsigned other = 0; other < 32; ++other)
            if (all.has(lane) && all.has(other) && all[lane].value == all[other].value) all[lane].got |= 1u << other;
      },
      where);
  return args.got;
}

// The best value of the lanes, by a comparison.
template <class Better>
int32_t reduce(const char* instruction, int32_t value, uint32_t lanes, simt::Where where) {
  int32_t best = value;
  simt::Block::current->together<int32_t>(
      instruction, lanes, best,
      [](const simt::Lanes<int32_t>& all) {
        const int32_t* found = nullptr;
        for (unsigned lane = 0; lane < 32; ++lane)
          if (all.has(lane) && (!found || Better()(all[lane], *found))) found = &all[lane];
        const int32_t value = *found;
        for (unsigned lane = 0; lane < 32; ++lane)
          if (all.has(lane)) all[lane] = value;
      },
      where);
  return best;
}

inline int32_t reduce_max(int32_t value, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  return reduce<std::greater<int32_t>>("reduce_max", value, lanes, where);
}
inline int32_t reduce_min(int32_t value, uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  return reduce<std::less<int32_t>>("reduce_min", value, lanes, where);
}

inline void sync_warp(uint32_t lanes = kAllLanes, simt::Where where = simt::Where::current()) {
  int none = 0;
  simt::Block::current->together<int>("sync_warp", lanes, none, [](const simt::Lanes<int>&) {}, where);
}
inline void sync_block(simt::Where where = simt::Where::current()) {
  simt::Block::current->sync(0, blockDim.x * blockDim.y * blockDim.z, where);
}

inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline int lowest_bit(uint32_t bits) { return bits ? std::countr_zero(bits) : -1; }

}  // namespace moe::arch
