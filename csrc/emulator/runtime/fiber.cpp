#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <memory>
#include <vector>
#endif

namespace cmaclip::emulator {

FiberStacks::~FiberStacks() {
  if (base_ != nullptr) munmap(base_, size_);
}

void FiberStacks::reserve(int count) {
  const size_t wanted = static_cast<size_t>(count) * kStackBytes;
  if (wanted <= size_) return;
  if (base_ != nullptr) munmap(base_, size_);
  base_ = nullptr;
  size_ = 0;
  void* memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  size_ = wanted;
  for (int index = 0; index < count; ++index) mprotect(base_ + index * kStackBytes, 4096, PROT_NONE);
}

#if defined(__x86_64__)

// The System V ABI keeps six general registers over a call; the stack pointer is the whole context besides.
asm(R"(
.text
.type cmaclip_switch_stack, @function
cmaclip_switch_stack:
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
.size cmaclip_switch_stack, . - cmaclip_switch_stack
)");
extern "C" __attribute__((visibility("hidden"))) void cmaclip_switch_stack(void** save, void* load);

void* FiberStacks::prepare(int index, void (*entry)()) {
  char* top = base_ + static_cast<size_t>(index + 1) * kStackBytes;
  // A function begins with its return address just below a 16-byte boundary.
  void** frame = reinterpret_cast<void**>(top - 8);
  frame[0] = nullptr;
  frame[-1] = reinterpret_cast<void*>(entry);
  std::memset(frame - 7, 0, 6 * sizeof(void*));
  return frame - 7;
}

void switch_stack(void** save, void* load) { cmaclip_switch_stack(save, load); }

#else

namespace {
std::vector<std::unique_ptr<ucontext_t>> contexts;
ucontext_t scheduler;
}  // namespace

void* FiberStacks::prepare(int index, void (*entry)()) {
  if (contexts.size() <= static_cast<size_t>(index)) contexts.resize(index + 1);
  if (!contexts[index]) contexts[index] = std::make_unique<ucontext_t>();
  ucontext_t& context = *contexts[index];
  getcontext(&context);
  context.uc_stack.ss_sp = base_ + static_cast<size_t>(index) * kStackBytes + 4096;
  context.uc_stack.ss_size = kStackBytes - 4096;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  return &context;
}

// A null `*save` stands for the scheduler, which has no fiber of its own.
void switch_stack(void** save, void* load) {
  if (*save == nullptr) *save = &scheduler;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}

#endif

}  // namespace cmaclip::emulator
