// Copies that run beside the thread that asked for them: until the wait that covers them their destination holds
// poison.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "machine/memory.h"

namespace simt {

class AsyncCopies {
 public:
  // The destination is poisoned by then.
  void copy(void* to, const void* from, int bytes, int valid) {
    Copy copy{.to = to, .bytes = bytes};
    if (valid > 0) std::memcpy(copy.data, from, size_t(valid));
    copies_.push_back(copy);
  }

  size_t begun() const { return landed_ + copies_.size(); }

  void commit() { groups_.push_back(begun()); }

  // Lands the oldest groups until `pending` are left.
  void wait(size_t pending) {
    for (; groups_.size() > pending; groups_.pop_front()) land(groups_.front());
  }

  // Lands the first `count` since the thread began.
  void land(size_t count) {
    for (; landed_ < count; ++landed_, copies_.pop_front()) {
      const Copy& copy = copies_.front();
      std::memcpy(copy.to, copy.data, size_t(copy.bytes));
    }
  }

 private:
  struct Copy {
    void* to;
    int bytes;
    unsigned char data[16] = {};
  };
  std::deque<Copy> copies_;
  std::deque<size_t> groups_;  // what had begun at their ends
  size_t landed_ = 0;
};

// Stores of TMA: shared memory must not change until it has been read, global memory has the data after the wait.
class BulkStores {
 public:
  struct Store {
    const char* changed;  // says so in a message
    std::function<bool()> unchanged;
    std::function<void()> write;
  };

  void store(Store store) { open_.push_back(std::move(store)); }
  void commit() { groups_.push_back({std::exchange(open_, {}), false}); }

  void wait_read(size_t pending, Where where) {
    for (size_t i = 0; i + pending < groups_.size(); ++i) {
      if (std::exchange(groups_[i].read, true)) continue;
      for (const Store& store : groups_[i].stores)
        if (!store.unchanged()) fail(store.changed, where);
    }
  }

  void wait(size_t pending, Where where) {
    wait_read(pending, where);
    for (; groups_.size() > pending; groups_.pop_front())
      for (const Store& store : groups_.front().stores) store.write();
  }

  bool reads_shared() const {
    if (!open_.empty()) return true;
    for (const Group& group : groups_)
      if (!group.read) return true;
    return false;
  }

 private:
  struct Group {
    std::vector<Store> stores;
    bool read;
  };
  std::vector<Store> open_;
  std::deque<Group> groups_;
};

}  // namespace simt
