// What TMA and wgmma see of a block's shared memory. Their own writes are seen by threads and by them; what threads
// store they see only after a fence_async_proxy.
#pragma once

#include <vector>

#include "machine/memory.h"

namespace simt {

class AsyncProxy {
 public:
  explicit AsyncProxy(const GuardedMemory& shared) : shared_(shared) {}

  void fence() {
    make();
    std::memcpy(seen_.data(), shared_.data(), seen_.size());
  }

  // By the asynchronous copies themselves.
  void write(void* to, const void* from, size_t bytes) {
    make();
    std::memcpy(to, from, bytes);
    std::memcpy(seen_.data() + shared_.offset(to), from, bytes);
  }
  void poison(void* to, size_t bytes) {
    std::memset(to, simt::poison(), bytes);
    if (!seen_.empty()) std::memset(seen_.data() + shared_.offset(to), simt::poison(), bytes);
  }

  // What a thread stored and no fence followed is a fault.
  void read(void* to, const void* from, size_t bytes, const char* what, Where where) {
    make();
    if (std::memcmp(seen_.data() + shared_.offset(from), from, bytes))
      fail(std::string(what) + " reads byte " + std::to_string(shared_.offset(from)) +
               " of shared memory, which a thread wrote (by a store or copy_async) and no fence_async_proxy followed",
           where);
    std::memcpy(to, from, bytes);
  }

 private:
  void make() {
    if (seen_.empty()) seen_.assign(shared_.bytes(), simt::poison());
  }

  const GuardedMemory& shared_;
  std::vector<unsigned char> seen_;
};

}  // namespace simt
