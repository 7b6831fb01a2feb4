// Memory whose bounds the emulator knows, and the checks of an access of several bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

using Where = std::source_location;

// What a kernel did wrong; the message says which kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const std::string& what, Where where);  // block.h: adds who is running

inline std::string show(Where where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

inline std::string show(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

// MOE_OPS_SIMT_SEED: the order of threads and blocks, and what uninitialised memory holds.
inline uint64_t seed() {
  static const uint64_t value = [] {
    const char* text = std::getenv("MOE_OPS_SIMT_SEED");
    return text ? std::strtoull(text, nullptr, 10) : 0;
  }();
  return value;
}

// Few, so that persistent kernels walk.
inline constexpr unsigned kProcessors = 4;

// NaN in every float type; as an integer -1, or with odd seeds an index far too large.
inline unsigned char poison() { return seed() % 2 ? 0x7f : 0xff; }

// Bytes between two guards, poisoned at first.
class GuardedMemory {
 public:
  static constexpr size_t kGuard = 1024, kAlign = 1024;

  GuardedMemory(size_t bytes, const char* name)
      : bytes_(bytes), name_(name), begin_(static_cast<unsigned char*>(std::aligned_alloc(kAlign, extent()))) {
    if (!begin_) throw std::bad_alloc();
    std::memset(begin_, kGuardByte, extent());
    fill();
    guard(true);
    known().emplace(uintptr_t(begin_), this);
  }
  ~GuardedMemory() {
    known().erase(uintptr_t(begin_));
    guard(false);
    std::free(begin_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  void fill() { std::memset(data(), poison(), bytes_); }
  unsigned char* data() const { return begin_ + kGuard; }
  size_t bytes() const { return bytes_; }
  const char* name() const { return name_; }
  bool holds(const void* p, size_t bytes) const {
    return offset(p) >= 0 && offset(p) + int64_t(bytes) <= int64_t(bytes_);
  }
  int64_t offset(const void* p) const { return static_cast<const unsigned char*>(p) - data(); }

  // The memory whose bytes or guards hold the address.
  static const GuardedMemory* around(const void* p) {
    auto next = known().upper_bound(uintptr_t(p));
    if (next == known().begin()) return nullptr;
    const GuardedMemory* memory = std::prev(next)->second;
    return uintptr_t(p) < uintptr_t(memory->begin_) + memory->extent() ? memory : nullptr;
  }

  // Plain stores are not checked one by one; what they left in a guard is seen here.
  static void check_guards() {
    for (const auto& [begin, memory] : known()) {
      memory->guard(false);
      for (size_t i = 0; i < memory->extent(); ++i) {
        if (i == kGuard) i += memory->bytes_;
        if (i < memory->extent() && memory->begin_[i] != kGuardByte)
          throw Error("a store out of bounds: byte " + std::to_string(int64_t(i) - int64_t(kGuard)) + " of " +
                      memory->name_ + " of " + std::to_string(memory->bytes_) + " bytes was written");
      }
      memory->guard(true);
    }
  }

 private:
  static constexpr unsigned char kGuardByte = 0xa5;

  size_t extent() const { return (kGuard + bytes_ + kGuard + kAlign - 1) / kAlign * kAlign; }
  void guard([[maybe_unused]] bool on) const {
#ifdef __SANITIZE_ADDRESS__
    if (on) {
      ASAN_POISON_MEMORY_REGION(begin_, kGuard);
      ASAN_POISON_MEMORY_REGION(data() + bytes_, extent() - kGuard - bytes_);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(begin_, extent());
    }
#endif
  }
  static std::map<uintptr_t, const GuardedMemory*>& known() {
    static std::map<uintptr_t, const GuardedMemory*> memories;
    return memories;
  }

  size_t bytes_;
  const char* name_;
  unsigned char* begin_;
};

// An access of `bytes` at once. Tensors are not known here: AddressSanitizer sees their bounds.
inline void check_access(const char* what, const void* p, size_t bytes, size_t align, Where where) {
  if (uintptr_t(p) % align)
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + show(p) + " is not aligned to " +
             std::to_string(align),
         where);
  const GuardedMemory* memory = GuardedMemory::around(p);
  if (memory && !memory->holds(p, bytes))
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes out of bounds: at byte " +
             std::to_string(memory->offset(p)) + " of " + memory->name() + " of " + std::to_string(memory->bytes()) +
             " bytes",
         where);
}

}  // namespace simt
