// Limits a token's choice to the experts of the best groups.
#pragma once

#include "cuda/arch/memory.cuh"
#include "cuda/kernels/rank.cuh"
#include "stages/params.h"

namespace moe {

// The key of a group's score. A group of one is worth its expert.
__device__ inline int32_t group_key(const RouteParams& p, const TopTwo& best) {
  if (p.group_score == GroupScore::max || p.experts == p.num_groups) return best.first;
  return key_of(value_of(best.first) + value_of(best.second));
}

__device__ inline int32_t masked_key(const RouteParams& p) {
  return key_of(p.group_mask == GroupMask::zero ? 0 : -kInfinity);
}

// How the lanes of a team walk over groups of at most 1024 experts in all.
struct GroupWalk {
  int lanes = 1;    // for one group, a power of two
  int inverse = 0;  // id / size = id * inverse >> kInverseBits

  static constexpr int kInverseBits = 20;  // exact for ids below 1024, sizes up to 1024
};

// The keys [E] and groups [G] of a team in shared memory are working space. Keys of the groups not kept are masked.
template <int kQuads>
__device__ void mask_groups(const RouteParams& p, const LaneTeam& team, const GroupWalk& walk, int32_t* keys,
                            int32_t* groups, Ranking<kQuads>& ranking) {
  constexpr int kValues = Ranking<kQuads>::kValues;
  const int num_groups = int(p.num_groups), size = int(p.experts) / num_groups;
#pragma unroll
  for (int quad = 0; quad < kValues; quad += 4) {
    arch::Pack<int32_t, 4> four;
    for (int i = 0; i < 4; ++i) four[i] = ranking.keys[quad + i];
    arch::store(keys + ranking.ids[quad], four);
  }
  team.sync();  // the keys are written

  // Lanes of different groups start at different places: not all in one bank.
  const int steps = (size + walk.lanes - 1) / walk.lanes, lane = team.rank & (walk.lanes - 1);
  for (int base = 0; base < num_groups; base += team.size / walk.lanes) {
    const int group = base + team.rank / walk.lanes;
    TopTwo best;
    int step = group % steps;
    for (int n = 0; n < steps; ++n) {
      const int i = step * walk.lanes + lane;
      if (group < num_groups && i < size) best.add(keys[group * size + i]);
      step = step + 1 == steps ? 0 : step + 1;
    }
    best.reduce(walk.lanes);
    if (group < num_groups && lane == 0) groups[group] = group_key(p, best);
  }
  team.sync();  // the keys are read, the groups written

  for (int group = team.rank; group < num_groups; group += team.size) {
    const int32_t own = groups[group];
    int place = 0;
    for (int other = 0; other < num_groups; ++other)
      place += groups[other] > own || (groups[other] == own && other < group);
    keys[group] = place < p.top_groups;
  }
  team.sync();  // who is kept is written

  const int32_t masked = masked_key(p);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int id = ranking.ids[i];
    if (id < p.experts && !keys[id * walk.inverse >> GroupWalk::kInverseBits]) ranking.keys[i] = masked;
  }
  team.sync();  // and read, before the next token
}

}  // namespace moe
