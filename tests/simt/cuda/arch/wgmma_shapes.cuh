// wgmma written out, for every width: which lane holds which element (PTX ISA, "Register Fragments for wgmma").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "machine/schedule.h"

namespace moe::arch {

// An operand as its descriptor tells it: `rows` of M or N from `first` on, 16 of K, in 128-byte swizzled rows.
struct OperandRows {
  uint64_t descriptor;
  int first, rows;
  bool across;

  // 16-byte chunks in the order they are read; `into` has 2 * rows of them.
  template <class F>
  void every_chunk(F f) const {
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                   stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const auto swizzled = [](uint32_t address) { return address ^ (address >> 7 & 7) << 4; };
    if (!across) {
      for (uint32_t row = uint32_t(first); row < uint32_t(first + rows); ++row)
        for (uint32_t half = 0; half < 2; ++half) f(swizzled(start + row / 8 * stride + row % 8 * 128 + half * 16));
    } else {
      for (uint32_t k = 0; k < 16; ++k)
        for (uint32_t row = uint32_t(first); row < uint32_t(first + rows); row += 8)
          f(swizzled(start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2));
    }
  }

  // Element (row, k) of the chunks that were read.
  uint16_t at(const std::vector<uint16_t>& read, int row, int k) const {
    return across ? read[size_t(k * rows + row)] : read[size_t(row * 16 + k)];
  }

  std::vector<uint16_t> read(const char* what, simt::Where where) const {
    if (descriptor >> 62 != 1) simt::fail(std::string(what) + ": only 128-byte swizzles are modelled", where);
    if (descriptor >> 49 & 7) simt::fail(std::string(what) + ": an operand's atom must be aligned to 1024", where);
    simt::Block& block = *simt::Block::current;
    std::vector<uint16_t> chunks(size_t(rows) * 16);
    uint16_t* to = chunks.data();
    every_chunk([&](uint32_t from) {
      const unsigned char* chunk = block.shared().data() + from;
      if (!block.shared().holds(chunk, 16)) simt::fail(std::string(what) + " reads outside shared memory", where);
      block.async_proxy().read(to, chunk, 16, what, where);
      to += 8;
    });
    return chunks;
  }

  bool unchanged(const simt::GuardedMemory& shared, const std::vector<uint16_t>& read) const {
    const uint16_t* was = read.data();
    bool same = true;
    every_chunk([&](uint32_t from) {
      same = same && std::memcmp(shared.data() + from, was, 16) == 0;
      was += 8;
    });
    return same;
  }
};

struct WgmmaArgs {
  float* d;
  uint64_t a, b;
  bool accumulate;
  simt::Where where;
};

template <class T>
float number(uint16_t bits) {
  return float(std::bit_cast<T>(bits));
}

// The warp's quarter: 16 rows of d, one float32 product after another.
template <class T, int n, bool a_across, bool b_across>
void multiply_quarter(const simt::Lanes<WgmmaArgs>& all) {
  simt::Block& block = *simt::Block::current;
  const WgmmaArgs& args = all[0];
  simt::Wgmmas::Registers registers{.of = {}, .count = n / 2};
  for (unsigned lane = 0; lane < 32; ++lane) {
    registers.of[lane] = all[lane].d;
    if (all[lane].a != args.a || all[lane].b != args.b || all[lane].accumulate != args.accumulate)
      simt::fail("wgmma: the lanes of a warp name different operands", args.where);
  }
  const int warp = int(block.thread().number / 32 % 4);
  const OperandRows a{.descriptor = args.a, .first = 16 * warp, .rows = 16, .across = a_across};
  const OperandRows b{.descriptor = args.b, .first = 0, .rows = n, .across = b_across};
  const std::vector<uint16_t> read_of_a = a.read("wgmma's a", args.where);
  const std::vector<uint16_t> read_of_b = b.read("wgmma's b", args.where);

  float of_a[16][16], of_b[16][n];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) of_a[row][k] = number<T>(a.at(read_of_a, row, k));
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < n; ++column) of_b[k][column] = number<T>(b.at(read_of_b, column, k));

  const auto unchanged = [a, b, read_of_a, read_of_b, &shared = block.shared()] {
    return a.unchanged(shared, read_of_a) && b.unchanged(shared, read_of_b);
  };
  block.wgmmas().ask(args.a, args.b);
  float* sums = block.wgmmas().begin(registers, args.accumulate, {unchanged, args.where});
  const auto sum_at = [&](int row, int column) -> float& {  // [count][lane]
    return sums[(column / 8 * 4 + row / 8 * 2 + column % 2) * 32 + row % 8 * 4 + column % 8 / 2];
  };
  for (int row = 0; row < 16; ++row) {
    float sum[n];
    for (int column = 0; column < n; ++column) sum[column] = sum_at(row, column);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column) sum[column] += of_a[row][k] * of_b[k][column];
    for (int column = 0; column < n; ++column) sum_at(row, column) = sum[column];
  }
}

template <class T, int n>
struct Wgmma {
  template <bool a_across, bool b_across>
  static void multiply(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate, simt::Where where) {
    WgmmaArgs args{d, a, b, accumulate, where};
    simt::Block::current->together("wgmma", 0xffffffff, args, multiply_quarter<T, n, a_across, b_across>, where);
  }
};

}  // namespace moe::arch
