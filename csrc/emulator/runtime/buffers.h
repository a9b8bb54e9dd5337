// The emulated global memory: guarded buffers in one reserved range of addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace cmaclip::emulator {

struct Buffer {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  // log2 of the bytes that one shadow cell stands for.
  int granule_shift = 0;
  // Set per launch: reached only through pointers to const.
  bool read_only = false;
  bool live = false;
  // Made when a launch first needs them.
  ZeroedArray<Cell> cells;
  // Per 32-byte sector, the last launch that touched it: how a launch's distinct sectors are counted.
  ZeroedArray<uint32_t> sectors;
};

class GlobalMemory {
 public:
  GlobalMemory();
  ~GlobalMemory();
  // `offset` bytes past a page boundary, so that a test can choose the alignment.
  int add(std::string name, size_t bytes, int element_bytes, size_t offset);
  void remove(int index);
  Buffer& at(int index) { return buffers_[index]; }

  bool contains(uintptr_t address) const { return address - base_ < kBytes; }
  // Null between buffers.
  Buffer* find(uintptr_t address) {
    const uint32_t index = pages_.data()[(address - base_) >> kPageShift];
    return index == 0 ? nullptr : &buffers_[index - 1];
  }
  Buffer* nearest(uintptr_t address);
  std::vector<Buffer>& all() { return buffers_; }

 private:
  static constexpr size_t kBytes = size_t{1} << 36;
  static constexpr int kPageShift = 12;

  uintptr_t base_ = 0;
  uintptr_t next_ = 0;
  int live_ = 0;
  std::vector<Buffer> buffers_;
  ZeroedArray<uint32_t> pages_;
};

}  // namespace cmaclip::emulator
