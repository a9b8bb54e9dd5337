// Switching stacks: one fiber per thread of a block.
#pragma once

#include <cstddef>

namespace cmaclip::emulator {

class FiberStacks {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  ~FiberStacks();
  // Room for `count` stacks, each with an unmapped page below it.
  void reserve(int count);
  // A stack on which `entry` starts when it is switched to; `entry` must never return.
  void* prepare(int index, void (*entry)());
  bool contains(const void* pointer) const {
    return static_cast<size_t>(static_cast<const char*>(pointer) - base_) < size_;
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0;
};

// Saves the running context and goes on with another.
void switch_stack(void** save, void* load);

}  // namespace cmaclip::emulator
