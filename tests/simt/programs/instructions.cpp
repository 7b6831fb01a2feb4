// The instructions of cuda/arch against scalar loops: prints a line for each, "right" or where it is wrong.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cuda/arch/atomic.cuh"
#include "cuda/arch/copy_async.cuh"
#include "cuda/arch/launch.cuh"
#include "cuda/arch/mma.cuh"
#include "cuda/arch/warp.cuh"
#include "device.h"

namespace {

using namespace moe;

// Small whole numbers: every sum of products is exact, whatever its order.
template <class T>
std::vector<T> whole_numbers(int count) {
  static std::mt19937 generator(7);
  std::vector<T> values;
  for (int i = 0; i < count; ++i) values.push_back(T(float(int(generator() % 9) - 4)));
  return values;
}

bool report(const char* what, const std::string& wrong) {
  std::printf("%s: %s\n", what, wrong.empty() ? "right" : wrong.c_str());
  return wrong.empty();
}

// Fragments as the PTX ISA tables them, read element by element from global memory: group g = lane / 4, t = lane % 4.
template <class T>
__global__ void multiply(const T* a, const T* b, float* d) {
  const int g = arch::lane_id() / 4, t = arch::lane_id() % 4;
  const auto pair = [](const T* at) {
    uint32_t bits;
    __builtin_memcpy(&bits, at, 4);
    return bits;
  };
  const uint32_t of_a[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8),
                            pair(a + (g + 8) * 16 + 2 * t + 8)};
  const uint32_t of_b[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
  float sum[4] = {1, 2, 3, 4};
  arch::mma_16x8x16<T>(sum, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i] - float(i + 1);
}

template <>
__global__ void multiply<float>(const float* a, const float* b, float* d) {
  const int g = arch::lane_id() / 4, t = arch::lane_id() % 4;
  const auto bits = [](float x) { return arch::to_tf32(x); };
  const uint32_t of_a[4] = {bits(a[g * 8 + t]), bits(a[(g + 8) * 8 + t]), bits(a[g * 8 + t + 4]),
                            bits(a[(g + 8) * 8 + t + 4])};
  const uint32_t of_b[2] = {bits(b[g * 8 + t]), bits(b[g * 8 + t + 4])};
  float sum[4] = {1, 2, 3, 4};
  arch::mma_16x8x8_tf32(sum, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i] - float(i + 1);
}

template <class T>
bool check_multiply(const char* what, int k) {
  const auto a = whole_numbers<T>(16 * k), b = whole_numbers<T>(8 * k);
  std::vector<float> d(16 * 8);
  launch({.grid = dim3(1), .block = dim3(32)}, multiply<T>, a.data(), b.data(), d.data());
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int kk = 0; kk < k; ++kk) sum += float(a[i * k + kk]) * float(b[j * k + kk]);
      if (sum != d[i * 8 + j]) return report(what, "wrong at " + std::to_string(i) + ", " + std::to_string(j));
    }
  return report(what, "");
}

struct MatrixShared {
  alignas(16) uint16_t rows[32][8];
};

template <bool transposed>
__global__ void load_matrix(uint32_t* out) {
  auto& shared = arch::shared<MatrixShared>();
  const int lane = arch::lane_id();
  for (int i = 0; i < 8; ++i) shared.rows[lane][i] = uint16_t(lane * 8 + i);
  arch::sync_warp();
  uint32_t got[4];
  if constexpr (transposed) arch::load_matrix_x4_transposed(got, shared.rows[lane]);
  else arch::load_matrix_x4(got, shared.rows[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = got[i];
}

template <bool transposed>
bool check_load_matrix(const char* what) {
  std::vector<uint32_t> out(32 * 4);
  launch({.grid = dim3(1), .block = dim3(32), .shared_bytes = sizeof(MatrixShared)}, load_matrix<transposed>,
         out.data());
  check(cudaStreamSynchronize(nullptr));
  for (int m = 0; m < 4; ++m)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const int i = transposed ? column : row, j = transposed ? row : column;
        const uint32_t got = out[(i * 4 + j / 2) * 4 + m] >> j % 2 * 16 & 0xffff;
        if (got != uint32_t((m * 8 + row) * 8 + column)) return report(what, "wrong in matrix " + std::to_string(m));
      }
  return report(what, "");
}

// What each lane of a warp gets, beside what it should get.
struct Answers {
  float shuffle, shuffle_xor, shuffle_up, narrow;
  double wide;
  uint32_t ballot, match, low_match;
};

__global__ void talk(Answers* out) {
  const int lane = arch::lane_id();
  const float value = float(lane * lane);
  Answers& answers = out[lane];
  answers.shuffle = arch::shuffle(value, lane * 7 + 3);
  answers.shuffle_xor = arch::shuffle_xor(value, 5);
  answers.shuffle_up = arch::shuffle_up(value, 4);
  answers.wide = arch::shuffle_xor(double(value), 1);
  answers.ballot = arch::ballot(lane % 3 == 0);
  answers.match = arch::match(lane % 5);
  answers.narrow = lane < 16 ? arch::shuffle_xor(value, 8, 0xffff) : arch::shuffle_xor(value, 8, 0xffff0000);
  if (lane < 16) answers.low_match = arch::match(lane % 2, 0xffff);
}

bool check_talk() {
  std::vector<Answers> out(32);
  launch({.grid = dim3(1), .block = dim3(32)}, talk, out.data());
  check(cudaStreamSynchronize(nullptr));
  std::string wrong;
  for (int lane = 0; lane < 32; ++lane) {
    const auto square = [](int lane) { return float(lane * lane); };
    const auto expect = [&](bool holds, const char* what) {
      if (!holds) wrong += std::string(wrong.empty() ? "" : ", ") + what + " of lane " + std::to_string(lane);
    };
    uint32_t same = 0, low = 0, thirds = 0;
    for (int other = 0; other < 32; ++other) {
      same |= uint32_t(other % 5 == lane % 5) << other;
      low |= uint32_t(other < 16 && other % 2 == lane % 2) << other;
      thirds |= uint32_t(other % 3 == 0) << other;
    }
    expect(out[lane].shuffle == square((lane * 7 + 3) % 32), "shuffle");
    expect(out[lane].shuffle_xor == square(lane ^ 5), "shuffle_xor");
    expect(out[lane].shuffle_up == square(lane < 4 ? lane : lane - 4), "shuffle_up");
    expect(out[lane].wide == double(square(lane ^ 1)), "shuffle of a double");
    expect(out[lane].ballot == thirds, "ballot");
    expect(out[lane].match == same, "match");
    expect(out[lane].narrow == square(lane ^ 8), "shuffle within half a warp");
    expect(lane >= 16 || out[lane].low_match == low, "match within half a warp");
  }
  return report("warp", wrong);
}

bool check_tf32() {
  const auto rounded = [](float x) { return std::bit_cast<float>(arch::to_tf32(x)); };
  const float unit = 0x1p-10f;
  const bool right = rounded(1 + unit / 4) == 1 && rounded(1 + unit / 2) == 1 + unit &&
                     rounded(-1 - unit / 2) == -1 - unit && std::isinf(rounded(INFINITY)) && std::isnan(rounded(NAN)) &&
                     rounded(0x1.fffffep127f) == INFINITY;
  return report("to_tf32", right ? "" : "wrong");
}

struct Extremes {
  int32_t max, min, max_of_half, min_of_half;
};

int32_t number_of(int lane) { return lane * 13 % 32 - 20; }  // each of -20 .. 11 once

__global__ void find_extremes(Extremes* out) {
  const int lane = arch::lane_id(), value = number_of(lane);
  const uint32_t half = lane < 16 ? 0xffff : 0xffff0000;
  out[lane] = {arch::reduce_max(value), arch::reduce_min(value), arch::reduce_max(value, half),
               arch::reduce_min(value, half)};
}

bool check_reduce() {
  std::vector<Extremes> out(32);
  launch({.grid = dim3(1), .block = dim3(32)}, find_extremes, out.data());
  check(cudaStreamSynchronize(nullptr));
  std::string wrong;
  for (int lane = 0; lane < 32; ++lane) {
    int32_t max = -100, min = 100;
    for (int other = lane / 16 * 16; other < lane / 16 * 16 + 16; ++other)
      max = std::max(max, number_of(other)), min = std::min(min, number_of(other));
    const Extremes& got = out[lane];
    if (got.max != 11 || got.min != -20 || got.max_of_half != max || got.min_of_half != min)
      wrong = "wrong in lane " + std::to_string(lane);
  }
  return report("reduce_max and reduce_min", wrong);
}

struct Totals {
  int32_t tickets = 5, sum = 100;
  uint64_t wide = 0xfffffff0, bits = 1;
};

// Every thread takes a ticket and adds its number.
__global__ void add_up(Totals* totals, int32_t* tickets) {
  const int32_t number = int32_t(blockIdx.x * blockDim.x + threadIdx.x);
  tickets[number] = arch::fetch_add(&totals->tickets, 1);
  arch::add(&totals->sum, -number);
  arch::add(&totals->wide, uint64_t(1) << 40);
  arch::set_bits(&totals->bits, uint64_t(1) << number % 64);
}

bool check_atomics() {
  constexpr int count = 3 * 16;
  Totals totals;
  std::vector<int32_t> tickets(count);
  launch({.grid = dim3(3), .block = dim3(16)}, add_up, &totals, tickets.data());
  check(cudaStreamSynchronize(nullptr));
  std::sort(tickets.begin(), tickets.end());
  bool right = totals.tickets == 5 + count && totals.sum == 100 - count * (count - 1) / 2 &&
               totals.wide == 0xfffffff0 + (uint64_t(count) << 40) && totals.bits == (uint64_t(1) << count) - 1;
  for (int i = 0; i < count; ++i) right &= tickets[i] == 5 + i;
  return report("atomic additions", right ? "" : "wrong");
}

struct BytesShared {
  alignas(16) unsigned char bytes[17][16];
};

// Thread n copies the first n bytes of a chunk; the last chunk ends behind them.
__global__ void copy_parts(const unsigned char* in, unsigned char* out) {
  auto& shared = arch::shared<BytesShared>();
  const int n = int(threadIdx.x);
  arch::copy_async_16(shared.bytes[n], in + 16 * n, n);
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  for (int i = 0; i < 16; ++i) out[16 * n + i] = shared.bytes[n][i];
}

bool check_copy_parts() {
  const Device device;
  for (int threads : {16, 17}) {  // the last copies 15 bytes of those there are, then a whole chunk
    const int there = 16 * (threads - 1) + threads - 1;
    auto* in = static_cast<unsigned char*>(device.scratch(there));
    for (int i = 0; i < there; ++i) in[i] = static_cast<unsigned char>(i % 251 + 1);
    std::vector<unsigned char> out(16 * threads);
    launch({.grid = dim3(1), .block = dim3(unsigned(threads)), .shared_bytes = sizeof(BytesShared)}, copy_parts, in,
           out.data());
    check(cudaStreamSynchronize(nullptr));
    for (int i = 0; i < 16 * threads; ++i)
      if (out[i] != (i % 16 < i / 16 ? i % 251 + 1 : 0))
        return report("copy_async_16 of a part", "wrong at byte " + std::to_string(i));
  }
  return report("copy_async_16 of a part", "");
}

// Two warps hand numbers to two others through one place, by two barriers of 128 threads each.
struct PlaceShared {
  int place;
};

__global__ void hand_over(int* out) {
  auto& shared = arch::shared<PlaceShared>();
  const auto meet = [](unsigned barrier) { simt::Block::current->sync(barrier, 128, simt::Where::current()); };
  for (int i = 0; i < 10; ++i) {
    if (threadIdx.x == 0) shared.place = i * i;
    meet(1);
    if (threadIdx.x >= 64) out[i * 64 + int(threadIdx.x) - 64] = shared.place;
    meet(2);
  }
}

bool check_named_barriers() {
  std::vector<int> out(10 * 64);
  launch({.grid = dim3(1), .block = dim3(128), .shared_bytes = sizeof(PlaceShared)}, hand_over, out.data());
  check(cudaStreamSynchronize(nullptr));
  bool right = true;
  for (int i = 0; i < 640; ++i) right &= out[i] == i / 64 * (i / 64);
  return report("named barriers", right ? "" : "wrong");
}

// Each block waits for the one before it.
__global__ void in_turn(int* turn, int* order) {
  if (threadIdx.x == 0) {
    while (*turn != int(blockIdx.x)) simt::Block::current->spin(simt::Where::current());
    order[blockIdx.x] = (*turn)++;
  }
  arch::sync_block();
}

bool check_waiting_blocks() {
  std::vector<int> order(20);
  int turn = 0;
  launch({.grid = dim3(20), .block = dim3(64)}, in_turn, &turn, order.data());
  check(cudaStreamSynchronize(nullptr));
  bool right = turn == 20;
  for (int i = 0; i < 20; ++i) right &= order[i] == i;
  return report("blocks that wait", right ? "" : "wrong");
}

}  // namespace

int main() {
  bool right = check_multiply<__nv_bfloat16>("mma_16x8x16 of bfloat16", 16);
  right &= check_multiply<__half>("mma_16x8x16 of float16", 16);
  right &= check_multiply<float>("mma_16x8x8_tf32", 8);
  right &= check_load_matrix<false>("load_matrix_x4");
  right &= check_load_matrix<true>("load_matrix_x4_transposed");
  right &= check_talk();
  right &= check_tf32();
  right &= check_reduce();
  right &= check_atomics();
  right &= check_copy_parts();
  right &= check_named_barriers();
  right &= check_waiting_blocks();
  return right ? 0 : 1;
}
