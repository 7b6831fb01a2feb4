// Functions that take turns on one OS thread, each on a stack of its own.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

// A page without access lies below each stack. Tops differ modulo the page, so that the stacks do not share cache sets.
class Stack {
 public:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kBytes = 512 << 10;
#else
  static constexpr size_t kBytes = 128 << 10;
#endif

  explicit Stack(unsigned number) : shift_(number % 61 * 1088) {
    void* pages =
        mmap(nullptr, kPage + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<unsigned char*>(pages);
    mprotect(pages_, kPage, PROT_NONE);
  }
  ~Stack() { munmap(pages_, kPage + kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  unsigned char* bottom() const { return pages_ + kPage; }
  size_t bytes() const { return kBytes - shift_; }

  // For a function that will never go on, and leaves its frames behind.
  void abandon() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(bottom(), bytes());
#endif
  }

 private:
  static constexpr size_t kPage = 4096;
  unsigned char* pages_;
  size_t shift_;
};

// What is kept of a function that does not run: the rest lies on its stack.
struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* bottom = nullptr;  // of its stack, for AddressSanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

#if defined(__x86_64__)
// Saves what a call must preserve on the stack, leaves its address in *from, and returns on the stack `to`.
[[gnu::naked, gnu::noinline, gnu::no_sanitize_address, gnu::no_sanitize_undefined]] inline void swap_stacks(
    void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("push %rbp\n\tpush %rbx\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\t"
      "mov %rsp, (%rdi)\n\tmov %rsi, %rsp\n\t"
      "pop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbx\n\tpop %rbp\n\tret");
}
#endif

// `enter` never returns; it begins with arrived().
inline void start(Fiber& fiber, const Stack& stack, void (*enter)()) {
  fiber.bottom = stack.bottom();
  fiber.bytes = stack.bytes();
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(stack.bottom() + stack.bytes());
  top[-1] = 0;  // where a backtrace ends
  top[-2] = reinterpret_cast<uintptr_t>(enter);
  for (int saved = 3; saved <= 8; ++saved) top[-saved] = 0;
  fiber.stack_pointer = top - 8;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {.ss_sp = stack.bottom(), .ss_flags = 0, .ss_size = stack.bytes()};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
#endif
}

// The stack of the OS thread that runs the fibers, for AddressSanitizer.
inline void describe_own_stack([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &fiber.bytes);
  pthread_attr_destroy(&attributes);
  fiber.bottom = bottom;
#endif
}

inline void arrived([[maybe_unused]] Fiber& self) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

// Returns when someone switches to `from` again; `ends` says that no one will.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from);
}

}  // namespace simt
