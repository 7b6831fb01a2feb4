// Copies that run beside the thread that asked for them: until the wait that covers them their destination holds
// poison.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "machine/memory.h"

namespace simt {

class AsyncCopies {
 public:
  void copy(void* to, const void* from, int bytes, int valid) {
    Copy copy{.to = to, .bytes = bytes};
    if (valid > 0) std::memcpy(copy.data, from, size_t(valid));
    std::memset(to, poison(), size_t(bytes));
    open_.push_back(copy);
  }

  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }

  // Lands the oldest groups until `pending` are left.
  void wait(size_t pending) {
    for (; groups_.size() > pending; groups_.erase(groups_.begin()))
      for (const Copy& copy : groups_.front()) std::memcpy(copy.to, copy.data, size_t(copy.bytes));
  }

 private:
  struct Copy {
    void* to;
    int bytes;
    unsigned char data[16] = {};
  };
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

}  // namespace simt
