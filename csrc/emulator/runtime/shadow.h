// What is remembered of each piece of memory, to find races and reads of what was never written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace cmaclip::emulator {

// Large and mostly untouched: calloc gives pages that cost nothing until used.
template <class T>
class ZeroedArray {
 public:
  ZeroedArray() = default;
  explicit ZeroedArray(size_t count) : data_(static_cast<T*>(std::calloc(count == 0 ? 1 : count, sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ZeroedArray(ZeroedArray&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ZeroedArray& operator=(ZeroedArray&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~ZeroedArray() { std::free(data_); }
  T* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

// One access: the block's serial number (0: none), the thread and its epoch, which grows at each barrier it passes.
struct Access {
  uint32_t block;
  uint32_t epoch;
  uint32_t site;
  uint16_t thread;
  uint16_t atomic;
};

struct Cell {
  Access write;
  // The last read by this block, or the only one of an earlier block that a write must not race with.
  Access read;
  Access earlier_read;
  // More concurrent reads of this block: an index into the pool of reader lists, 0 for none.
  uint32_t readers;
  // Its cp.async has not been waited for.
  uint32_t in_flight;
};

}  // namespace cmaclip::emulator
