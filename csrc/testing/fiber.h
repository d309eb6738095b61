// One fiber: a stack of its own and the few registers that a function call must keep.
//
// The host shim runs every CUDA thread of a block as a fiber on one OS thread. A switch saves the
// callee-saved registers on the old stack, swaps the stack pointer, and pops them from the new one.
// Other processors fall back on ucontext, which does the same with two system calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LIAR_ASAN 1
#endif

#if !(defined(__x86_64__) && defined(__linux__)) || defined(LIAR_PORTABLE_FIBERS)
#include <ucontext.h>
#define LIAR_UCONTEXT 1
#endif

namespace liar::testing {

#ifndef LIAR_UCONTEXT
extern "C" void liar_switch_stack(void** save, void* load);

// rbx, rbp, r12-r15 are what the System V ABI asks a callee to keep; the return address is already
// on the stack. Weak, so that several translation units may include this header.
asm(R"(
.weak liar_switch_stack
.type liar_switch_stack,@function
liar_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size liar_switch_stack,.-liar_switch_stack
)");
#endif

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 128 << 10;  // sanitizers triple a kernel's frames

  using Entry = void (*)();

  // A default-constructed fiber is the OS thread's own stack.
  Fiber() = default;

  void prepare(Entry entry) {
    if (!stack_) stack_.reset(new (std::align_val_t(64)) char[kStackBytes]);
#ifdef LIAR_ASAN
    // An abandoned kernel leaves the red zones of its frames behind.
    __asan_unpoison_memory_region(stack_.get(), kStackBytes);
    fake_stack_ = nullptr;
#endif
#ifdef LIAR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto top = reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) & ~std::uintptr_t(15);
    void** slot = reinterpret_cast<void**>(top) - 2;  // `ret` must leave rsp = 8 (mod 16)
    slot[0] = reinterpret_cast<void*>(entry);
    slot[1] = nullptr;
    for (int i = 1; i <= 6; ++i) slot[-i] = nullptr;  // the six popped registers
    pointer_ = slot - 6;
#endif
  }

  // Leaves `this` and continues `to`; comes back when somebody switches to `this` again.
  // `last` says that `this` never runs again.
  void switch_to(Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef LIAR_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.bottom(), to.size());
#endif
#ifdef LIAR_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    liar_switch_stack(&pointer_, to.pointer_);
#endif
#ifdef LIAR_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // Called first thing inside a new fiber; tells the sanitizer where the caller's stack lies.
  void entered([[maybe_unused]] Fiber& from) {
#ifdef LIAR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &from.caller_bottom_, &from.caller_size_);
#endif
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
#ifdef LIAR_ASAN
  const void* bottom() const { return stack_ ? stack_.get() : caller_bottom_; }
  std::size_t size() const { return stack_ ? kStackBytes : caller_size_; }
  const void* caller_bottom_ = nullptr;
  std::size_t caller_size_ = 0;
  void* fake_stack_ = nullptr;
#endif
#ifdef LIAR_UCONTEXT
  ucontext_t context_{};
#else
  void* pointer_ = nullptr;
#endif
  std::unique_ptr<char[], Free> stack_;
};

}  // namespace liar::testing
