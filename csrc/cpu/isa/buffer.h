// Working memory of one piece of work, aligned for vectors. It takes the place of std::vector in code compiled per
// instruction set, whose instances in a common namespace the linker would merge across instruction sets.
#pragma once

#include <new>

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(operator new(count * sizeof(T) + 64, std::align_val_t(64)))) {}
  ~Buffer() { operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  MOE_INLINE operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace moe::MOE_ISA
