#include "buffers.h"

#include <sys/mman.h>

#include <stdexcept>

namespace cmaclip::emulator {

GlobalMemory::GlobalMemory() : pages_(kBytes >> kPageShift) {
  void* memory = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = reinterpret_cast<uintptr_t>(memory);
  next_ = base_ + (size_t{1} << 20);
}

GlobalMemory::~GlobalMemory() { munmap(reinterpret_cast<void*>(base_), kBytes); }

int GlobalMemory::add(std::string name, size_t bytes, int element_bytes, size_t offset) {
  const size_t page = size_t{1} << kPageShift;
  if (offset >= page) throw std::invalid_argument("a buffer's offset must be less than 4096 bytes");
  if (live_ == 0) next_ = base_ + (size_t{1} << 20);
  const size_t mapped = (offset + (bytes == 0 ? 1 : bytes) + page - 1) / page * page;
  // The gap below a buffer stays unmapped, as does that above the last.
  if (next_ + mapped + 2 * page > base_ + kBytes) throw std::bad_alloc();
  const uintptr_t start = next_;
  next_ += mapped + 16 * page;
  if (mprotect(reinterpret_cast<void*>(start), mapped, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();

  size_t index = 0;
  while (index < buffers_.size() && buffers_[index].live) ++index;
  if (index == buffers_.size()) buffers_.emplace_back();
  Buffer& buffer = buffers_[index];
  buffer = Buffer();
  buffer.name = std::move(name);
  buffer.begin = start + offset;
  buffer.bytes = bytes;
  buffer.granule_shift = element_bytes >= 4 ? 2 : element_bytes >= 2 ? 1 : 0;
  buffer.live = true;
  ++live_;
  for (uintptr_t at = start; at < start + mapped; at += page) {
    pages_.data()[(at - base_) >> kPageShift] = static_cast<uint32_t>(index + 1);
  }
  return static_cast<int>(index);
}

void GlobalMemory::remove(int index) {
  Buffer& buffer = buffers_[index];
  const size_t page = size_t{1} << kPageShift;
  const uintptr_t start = buffer.begin / page * page;
  const uintptr_t end = (buffer.begin + (buffer.bytes == 0 ? 1 : buffer.bytes) + page - 1) / page * page;
  for (uintptr_t at = start; at < end; at += page) pages_.data()[(at - base_) >> kPageShift] = 0;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
  mprotect(reinterpret_cast<void*>(start), end - start, PROT_NONE);
  buffer = Buffer();
  --live_;
}

Buffer* GlobalMemory::nearest(uintptr_t address) {
  Buffer* best = nullptr;
  uintptr_t distance = ~uintptr_t{0};
  for (Buffer& buffer : buffers_) {
    if (!buffer.live) continue;
    const uintptr_t end = buffer.begin + buffer.bytes;
    const uintptr_t away = address < buffer.begin ? buffer.begin - address : address >= end ? address - end : 0;
    if (away < distance) {
      distance = away;
      best = &buffer;
    }
  }
  return best;
}

}  // namespace cmaclip::emulator
