// plan: a stable counting sort of the T * K slots by expert, with a limit of rows per expert.
//
// The slots are cut into tiles, whose number depends on shapes alone. Each tile counts its experts; a scan over the
// tiles tells every tile where its rows of each expert begin; each tile then places its slots in order. An expert's
// number is kept in slot_row, where the row later takes its place, and dropped slots go to one expert more, number
// `num_experts`, so that they sort behind the others in slot order. A limit is applied first, by turning slots into
// dropped ones.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/device.h"

namespace moe {
namespace {

constexpr int64_t kTileSlots = 8192;  // at least, and at least one for each expert: counts take no more room than ids
constexpr int64_t kMaxTiles = 64;

// The route weight of a slot as an integer in the same order: -0 equals 0, every NaN is the largest.
int64_t order_key(const Vector& weights, int64_t slot) {
  auto key = [](int64_t bits, int64_t sign, int64_t infinity) {
    int64_t magnitude = bits & ~sign;
    if (magnitude > infinity) return std::numeric_limits<int64_t>::max();
    return bits & sign ? -magnitude : magnitude;
  };
  switch (weights.dtype) {
    case Dtype::float32: return key(static_cast<const uint32_t*>(weights.data)[slot], 0x80000000, 0x7f800000);
    case Dtype::bfloat16: return key(static_cast<const uint16_t*>(weights.data)[slot], 0x8000, 0x7f80);
    case Dtype::float16: return key(static_cast<const uint16_t*>(weights.data)[slot], 0x8000, 0x7c00);
    default:
      return key(static_cast<const int64_t*>(weights.data)[slot], std::numeric_limits<int64_t>::min(),
                 0x7ff0000000000000);
  }
}

// The slots in an order of walking: by number (step 1), or all first choices before all second ones (step K).
struct Walk {
  int64_t slots, step;

  int64_t at(int64_t i) const {
    int64_t tokens = slots / step;
    return i % tokens * step + i / tokens;
  }
  int64_t next(int64_t slot) const { return slot + step < slots ? slot + step : slot + step - slots + 1; }
};

class Sort {
 public:
  explicit Sort(const PlanParams& params)
      : p_(params),
        slots_(params.tokens * params.top_k),
        buckets_(params.num_experts + 1),
        tiles_(std::clamp(slots_ / std::max(kTileSlots, buckets_), int64_t(1), kMaxTiles)),
        counts_(new int32_t[tiles_ * buckets_]),
        totals_(new int32_t[buckets_]) {}

  void run() {
    p_.experts_are_int64 ? count(static_cast<const int64_t*>(p_.experts))
                         : count(static_cast<const int32_t*>(p_.experts));
    if (p_.capacity < slots_ && *std::max_element(totals_.get(), totals_.get() + p_.num_experts) > p_.capacity) drop();
    write_offsets();
    place(p_.slot_row);
    std::copy_n(totals_.get(), p_.num_experts, p_.counts);
  }

 private:
  // Calls f(counts of the tile, begin, end) for every tile.
  template <class F>
  void for_tiles(const F& f) {
    auto some = [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile)
        f(counts_.get() + tile * buckets_, slots_ * tile / tiles_, slots_ * (tile + 1) / tiles_);
    };
    tiles_ == 1 ? some(0, 1) : torch::stable::parallel_for(0, tiles_, 1, some);
  }

  // Copies the experts into slot_row, and counts them.
  template <class Id>
  void count(const Id* experts) {
    for_tiles([&](int32_t* counts, int64_t begin, int64_t end) {
      std::fill_n(counts, buckets_, 0);
      for (int64_t slot = begin; slot < end; ++slot) {
        bool valid = experts[slot] >= 0 && experts[slot] < p_.num_experts;
        int32_t expert = valid ? int32_t(experts[slot]) : int32_t(p_.num_experts);
        p_.slot_row[slot] = expert;
        ++counts[expert];
      }
    });
    scan();
  }

  // Counts the experts that stand in slot_row, in the order of a walk.
  void count(Walk walk) {
    for_tiles([&](int32_t* counts, int64_t begin, int64_t end) {
      std::fill_n(counts, buckets_, 0);
      for (int64_t i = begin, slot = walk.at(begin); i < end; ++i, slot = walk.next(slot)) ++counts[p_.slot_row[slot]];
    });
    scan();
  }

  // A tile's counts become the number of slots of each expert in the tiles before it.
  void scan() {
    auto columns = [&](int64_t begin, int64_t end) {
      std::fill(totals_.get() + begin, totals_.get() + end, 0);
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        int32_t* counts = counts_.get() + tile * buckets_;
        for (int64_t bucket = begin; bucket < end; ++bucket) {
          int32_t before = totals_[bucket];
          totals_[bucket] += counts[bucket];
          counts[bucket] = before;
        }
      }
    };
    tiles_ == 1 ? columns(0, buckets_) : torch::stable::parallel_for(0, buckets_, 2048, columns);
  }

  void write_offsets() {
    p_.offsets[0] = 0;
    for (int64_t e = 0; e < p_.num_experts; ++e) p_.offsets[e + 1] = p_.offsets[e] + totals_[e];
  }

  // Gives every slot its row; slot_row is left alone where it is null.
  void place(int32_t* slot_row) {
    for_tiles([&](int32_t* next, int64_t begin, int64_t end) {
      for (int64_t bucket = 0; bucket < buckets_; ++bucket) next[bucket] += p_.offsets[bucket];
      for (int64_t slot = begin; slot < end; ++slot) {
        int32_t expert = p_.slot_row[slot];
        int32_t row = next[expert]++;
        p_.row_slot[row] = int32_t(slot);
        if (slot_row) slot_row[slot] = expert < p_.num_experts ? row : -1;
      }
    });
  }

  // Turns what exceeds the capacity of an expert into dropped slots.
  void drop() {
    if (p_.drop_policy == DropPolicy::probability) {
      drop_least_probable();
    } else {
      Walk walk{.slots = slots_, .step = p_.drop_policy == DropPolicy::choice_first ? p_.top_k : 1};
      if (walk.step != 1) count(walk);
      for_tiles([&](int32_t* rank, int64_t begin, int64_t end) {
        for (int64_t i = begin, slot = walk.at(begin); i < end; ++i, slot = walk.next(slot)) {
          int32_t& expert = p_.slot_row[slot];
          if (expert < p_.num_experts && rank[expert]++ >= p_.capacity) expert = int32_t(p_.num_experts);
        }
      });
    }
    count(Walk{.slots = slots_, .step = 1});
  }

  void drop_least_probable() {
    write_offsets();
    place(nullptr);
    auto before = [&](int32_t a, int32_t b) {
      int64_t key_a = order_key(p_.weights, a), key_b = order_key(p_.weights, b);
      return key_a != key_b ? key_a > key_b : a < b;
    };
    auto experts = [&](int64_t first, int64_t last) {
      for (int64_t e = first; e < last; ++e) {
        if (totals_[e] <= p_.capacity) continue;
        int32_t *begin = p_.row_slot + p_.offsets[e], *end = p_.row_slot + p_.offsets[e + 1],
                *kept = begin + p_.capacity;
        std::nth_element(begin, kept, end, before);
        for (int32_t* slot = kept; slot < end; ++slot) p_.slot_row[*slot] = int32_t(p_.num_experts);
      }
    };
    torch::stable::parallel_for(0, p_.num_experts, 1 + p_.num_experts * kTileSlots / slots_, experts);
  }

  const PlanParams& p_;
  int64_t slots_, buckets_, tiles_;
  std::unique_ptr<int32_t[]> counts_;  // [tiles, buckets]
  std::unique_ptr<int32_t[]> totals_;  // [buckets]
};

}  // namespace

void plan(const PlanParams& params, const Device&) { Sort(params).run(); }

}  // namespace moe
