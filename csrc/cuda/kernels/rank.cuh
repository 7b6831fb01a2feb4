// Exact selection of the largest values, ties to the lowest id. Values are compared as integers whose order is:
// -inf .. -0 == +0 .. +inf, NaN.
#pragma once

#include <limits>

#include "cuda/kernels/team.cuh"

namespace moe {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();  // below the key of -inf
inline constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();

__device__ __forceinline__ int32_t key_of(float x) {
  x += 0.0f;  // turns -0 into +0
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return x == x ? bits ^ (bits >> 31 & kLargest) : kLargest;
}

// The value a key was made of; NaN for NaN, +0 for -0.
__device__ __forceinline__ float value_of(int32_t key) {
  key ^= key >> 31 & kLargest;
  float x;
  __builtin_memcpy(&x, &key, 4);
  return x;
}

// Each lane sorts its values by fours; the largest of all is then the head of one four.
template <int kQuads>
struct Ranking {
  static constexpr int kValues = 4 * kQuads;

  int32_t keys[kValues], ids[kValues];

  // Fours hold neighbours in ascending order of ids, so that swaps of unequal neighbours keep ties in order.
  __device__ void sort() {
#pragma unroll
    for (int quad = 0; quad < kValues; quad += 4)
#pragma unroll
      for (int end = 3; end > 0; --end)
#pragma unroll
        for (int i = quad; i < quad + end; ++i) {
          const bool swap = keys[i + 1] > keys[i];
          const int32_t key = keys[i], id = ids[i];
          keys[i] = swap ? keys[i + 1] : key, ids[i] = swap ? ids[i + 1] : id;
          keys[i + 1] = swap ? key : keys[i + 1], ids[i + 1] = swap ? id : ids[i + 1];
        }
  }

  // Removes the largest key of the team and returns its id, in every lane.
  __device__ int32_t take(const LaneTeam& team) {
    int32_t key = keys[0], id = ids[0];
#pragma unroll
    for (int quad = 4; quad < kValues; quad += 4)  // ids ascend with the quads of a lane
      if (keys[quad] > key) key = keys[quad], id = ids[quad];

    if (team.size == 32) {
      const int32_t largest = arch::reduce_max(key);
      id = arch::reduce_min(key == largest ? id : kLargest);
    } else {
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2)
        if (distance < team.size) {
          const int32_t other = arch::shuffle_xor(key, distance), other_id = arch::shuffle_xor(id, distance);
          if (other > key || (other == key && other_id < id)) key = other, id = other_id;
        }
    }

#pragma unroll
    for (int quad = 0; quad < kValues; quad += 4)
      if (ids[quad] == id) {
#pragma unroll
        for (int i = quad; i < quad + 3; ++i) keys[i] = keys[i + 1], ids[i] = ids[i + 1];
        keys[quad + 3] = kTaken, ids[quad + 3] = kLargest;
      }
    return id;
  }
};

// The two largest keys of all that was added.
struct TopTwo {
  int32_t first = kTaken, second = kTaken;

  __device__ void add(int32_t key) {
    const int32_t smaller = key > first ? first : key;
    first = key > first ? key : first;
    second = smaller > second ? smaller : second;
  }

  // Those of `size` lanes side by side; all lanes of the warp call it.
  __device__ void reduce(int size) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      const int32_t other_first = arch::shuffle_xor(first, distance), other = arch::shuffle_xor(second, distance);
      add(other_first);
      add(other);
    }
  }
};

}  // namespace moe
