// What each stage is told: plain structs, filled with designated initialisers, no torch.
// Nouns: tokens T, experts E, top_k K, rows R = T * K, hidden H, inner I. A slot is one (token, k) pair, numbered
// token * K + k; a row is a slot's place in expert order. Strides count elements.
#pragma once

#include <cstdint>
#include <limits>

namespace moe {

enum class Dtype : int8_t { float32, bfloat16, float16, float64 };

constexpr int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::float64: return 8;
    default: return 2;
  }
}

// The numbers are part of the operators' schemas; python/moe_ops/checks.py lists the same names in the same order.
enum class Score : int8_t { softmax, softmax_selected, sigmoid, sqrtsoftplus, identity };
enum class GroupScore : int8_t { max, top2_sum };
enum class GroupMask : int8_t { minus_inf, zero };
enum class Renormalize : int8_t { none, sum, clamp, pnorm };
enum class DropPolicy : int8_t { position, choice_first, probability };
enum class Act : int8_t { silu, gelu, gelu_tanh, relu, relu2 };

// A tensor of floats whose last dimension has unit stride.
struct Matrix {
  void* data = nullptr;  // [rows, cols]
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;  // between rows

  explicit operator bool() const { return data != nullptr; }
};

// Values read one at a time (route weights, biases): contiguous, any float dtype.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;

  explicit operator bool() const { return data != nullptr; }
};

// How a score becomes a weight; shared by route and its backward.
struct RouteOptions {
  Score score = Score::softmax;
  Renormalize renormalize = Renormalize::none;
  double eps = 1e-20;
  double p = 1;  // of the p-norm
  double scale = 1;
  double softcap = 0;  // z = softcap * tanh(logit / softcap); 0 means none
};

struct RouteParams {
  Matrix logits;  // [T, E]
  int64_t tokens, experts, top_k;
  RouteOptions options;
  const void* selection_bias = nullptr;  // [E] in the compute dtype: float64 for float64 logits, float32 otherwise
  const void* expert_scale = nullptr;    // [E] in the compute dtype
  int64_t num_groups = 1, top_groups = 1;
  GroupScore group_score = GroupScore::top2_sum;
  GroupMask group_mask = GroupMask::minus_inf;

  void* weights;    // [T, K] compute dtype
  int32_t* chosen;  // [T, K]

  // stats; null when not asked for
  const int32_t* segments = nullptr;  // [T], values outside 0..num_segments-1 count nowhere; null: all are segment 0
  int64_t num_segments = 1;
  int32_t* counts = nullptr;  // [S, E]
  void* mean_prob = nullptr;  // [S, E] compute dtype
  void* logsumexp = nullptr;  // [T] compute dtype
};

struct RouteBackwardParams {
  const void* grad_weights = nullptr;    // [T, K] compute dtype
  const void* grad_mean_prob = nullptr;  // [S, E] compute dtype
  const void* grad_logsumexp = nullptr;  // [T] compute dtype
  Matrix logits;                         // [T, E]
  const int32_t* chosen;                 // [T, K]
  int64_t tokens, experts, top_k;
  RouteOptions options;
  const void* expert_scale = nullptr;  // [E] compute dtype
  const int32_t* segments = nullptr;   // [T]
  int64_t num_segments = 1;

  Matrix grad_logits;                 // [T, E]
  void* grad_expert_scale = nullptr;  // [E] compute dtype
};

struct PlanParams {
  const void* experts;  // [T, K] int32 or int64, contiguous
  bool experts_are_int64;
  int64_t tokens, top_k, num_experts;
  int64_t capacity = std::numeric_limits<int64_t>::max();  // rows per expert
  DropPolicy drop_policy = DropPolicy::position;
  Vector weights;  // [T, K], read by DropPolicy::probability

  int32_t* offsets;   // [E + 1]
  int32_t* row_slot;  // [R]
  int32_t* slot_row;  // [T, K], -1 where dropped
  int32_t* counts;    // [E], after drops
};

// rows[r] = x[row_slot[r] / width], or zeros where slot_row[row_slot[r]] != r (a dropped slot). Any element type: rows
// are bytes.
struct PermuteParams {
  const void* x;  // [T, row_bytes]
  int64_t x_stride_bytes;
  const int32_t* row_slot;  // [R]
  const int32_t* slot_row;  // [T, width]
  int64_t tokens, width, rows, row_bytes;
  void* out;  // [R, row_bytes]
};

// y[t] = sum over k, in order, of weights[t, k] * rows[slot_row[t, k]]; rows outside 0..R-1 are skipped.
struct CombineParams {
  Matrix rows;              // [R, H]
  Vector weights;           // [T, width] or null: ones
  const int32_t* slot_row;  // [T, width]
  int64_t tokens, width, num_rows, hidden;
  Matrix y;  // [T, H], dtype of rows
};

// grad_rows[r] = weights[slot] * grad_y[token], zeros for dropped slots; grad_weights[t, k] = <grad_y[t],
// rows[slot_row[t, k]]>.
struct CombineBackwardParams {
  Matrix grad_y;            // [T, H]
  Matrix rows;              // [R, H], read only for grad_weights
  Vector weights;           // [T, width] or null: ones
  const int32_t* row_slot;  // [R]
  const int32_t* slot_row;  // [T, width]
  int64_t tokens, width, num_rows, hidden;
  Matrix grad_rows;              // [R, H] or null
  void* grad_weights = nullptr;  // [T, width] dtype of weights, or null
};

// Expert weights [E, N, K] with unit stride along N or along K; or prepacked: [E, panels, steps, columns, values],
// contiguous, zeros behind N and K. A panel holds the rows of `columns` n; a step of it, 128 bytes, one value of each,
// or two where a value has 2 bytes.
struct ExpertWeights {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t expert_stride = 0, n_stride = 0, k_stride = 1;
  bool prepacked = false;  // then only expert_stride is read
};

constexpr int64_t panel_columns(Dtype dtype) { return dtype == Dtype::float64 ? 16 : 32; }
constexpr int64_t panel_values(Dtype dtype) { return size_of(dtype) == 2 ? 2 : 1; }

// Rows of a GEMM operand: row r of the problem is row `row_slot[r] / width` of `rows` when a gather is given, row r
// otherwise, times scale[row_slot[r]] (rounded to the operand's dtype) when a scale is given.
struct GatheredRows {
  Matrix rows;
  const int32_t* row_slot = nullptr;  // [R]
  int64_t width = 1, num_rows = 0;    // slots per row of `rows`; rows in `rows`
  Vector scale;                       // [num_rows * width] by slot
};

struct Activation {
  Act act = Act::silu;
  bool gated = true;
  bool interleaved = false;  // gate and up alternate along 2I; otherwise all gates stand before all ups
  double alpha = 1;          // silu: z * sigmoid(alpha * z)
  double limit = std::numeric_limits<double>::infinity();  // gate <= limit, |up| <= limit
  double up_offset = 0;                                    // act(gate) * (up + up_offset)
};

enum class Epilogue : int8_t { store, activate, activate_backward };

// out[r] = epilogue(a[r] . W_e^T + bias_e) for the rows r of expert e; rows from offsets[E] on are zeros.
struct GroupedGemmParams {
  GatheredRows a;          // [R, K]
  ExpertWeights weight;    // [E, N, K]
  const int32_t* offsets;  // [E + 1]
  int64_t num_experts, num_rows, n, k;
  Vector bias;                   // [E, N]
  bool allow_tf32 = false;       // float32 operands may be rounded to TF32 where that is faster
  bool batch_invariant = false;  // a row's bits must not depend on the number of rows

  Epilogue epilogue = Epilogue::store;
  Activation activation;
  Matrix out;  // store: [R, N]; activate: inner [R, I]; activate_backward: scaled inner s * A [R, I]
  Matrix pre;  // pre-activation [R, 2I or I], in the weights' row order; activate: written if given; activate_backward:
               // read

  // activate_backward only. The product is dA' [R, I] = dY[t] . W_out; s = score[a.row_slot[r]] or 1.
  Matrix grad_pre;             // out: dH [R, 2I or I] = s * dA' * act'(H)
  Vector score;                // [T * width] by slot
  Vector score_bias;           // [E, K], b_out
  void* grad_score = nullptr;  // out: [T * width] by slot, <dA', A> + <a[r], score_bias_e>; compute dtype
};

// out[e] = grad[rows of e]^T . a[rows of e]: [E, N, K], summed in row order; an empty expert gives zeros.
struct WeightGradParams {
  GatheredRows grad;  // [R, N]
  GatheredRows a;     // [R, K]
  const int32_t* offsets;
  int64_t num_experts, num_rows, n, k;
  void* out;  // [E, N, K] contiguous
  Dtype out_dtype;
  bool accumulate = false;  // out += instead of out =
  bool allow_tf32 = false;  // as above
};

// out[e] = sum of grad[rows of e]: [E, N], summed in row order.
struct BiasGradParams {
  GatheredRows grad;  // [R, N]
  const int32_t* offsets;
  int64_t num_experts, num_rows, n;
  void* out;  // [E, N] contiguous
  Dtype out_dtype;
};

}  // namespace moe
