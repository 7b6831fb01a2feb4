// combine and its backward: one launch each.
#include "cuda/kernels/combine.cuh"

#include "cuda/arch/launch.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {
namespace {

// Accesses of 16 bytes, where all that is given allows them; of one element elsewhere.
Flag wide(std::initializer_list<Matrix> tensors, int64_t hidden) {
  bool aligned = true;
  for (const Matrix& m : tensors)
    if (m) aligned &= has_aligned_rows(m) && hidden * size_of(m.dtype) % 16 == 0;
  return flag(aligned);
}

template <class T, bool wide>
constexpr int kElements = wide ? 16 / int(sizeof(T)) : 1;

}  // namespace

void combine(const CombineParams& p, const Device& device) {
  const FloatType type = float_type(p.rows.dtype, "combine");
  if (p.tokens == 0 || p.hidden == 0) return;
  std::visit(
      [&](auto type, auto wide) {
        using T = decltype(type)::type;
        constexpr int n = kElements<T, wide>;
        launch({.grid = unsigned(combine_blocks<T, n>(p)),
                .block = kCombineThreads,
                .stream = device.stream(),
                .early = device.starts_early()},
               combine_kernel<T, n>, p);
      },
      type, wide({p.rows, p.y}, p.hidden));
}

void combine_backward(const CombineBackwardParams& p, const Device& device) {
  std::visit(
      [&](auto type, auto wide, auto rows, auto dot) {
        using T = decltype(type)::type;
        if constexpr (rows || dot)
          launch({.grid = unsigned(combine_backward_blocks(p)),
                  .block = kCombineThreads,
                  .stream = device.stream(),
                  .early = device.starts_early()},
                 combine_backward_kernel<T, kElements<T, wide>, rows, dot>, p);
      },
      float_type(p.grad_y.dtype, "combine_backward"), wide({p.grad_y, p.rows, p.grad_rows}, p.hidden),
      flag(bool(p.grad_rows)), flag(p.grad_weights != nullptr));
}

}  // namespace moe
