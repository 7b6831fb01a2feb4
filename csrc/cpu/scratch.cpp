#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace moe {

void* scratch(size_t bytes) {
  constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlign); }
  };
  static thread_local std::unique_ptr<void, Free> buffer;
  static thread_local size_t size = 0;
  if (size < bytes) {
    buffer.reset(::operator new(bytes, kAlign));
    size = bytes;
  }
  return buffer.get();
}

}  // namespace moe
