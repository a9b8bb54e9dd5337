// Groups the accesses of a warp's lanes into the accesses the hardware would make, and counts what they cost.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace cmaclip::emulator {

struct SiteCounts {
  uint64_t global_accesses = 0;
  uint64_t sectors = 0;
  uint64_t fewest_sectors = 0;
  uint64_t shared_accesses = 0;
  uint64_t wavefronts = 0;
  uint64_t fewest_wavefronts = 0;
};

enum class Space : uint8_t { global, shared };

// The n-th execution of one instruction by each lane of a warp since the lanes last met is one access of the warp.
class WarpAccesses {
 public:
  void reset();
  void add(int site_index, int lane, uintptr_t address, int bytes, Space space);
  // Called where all lanes of the warp have met, and at the end.
  void flush(std::vector<SiteCounts>& counts);

 private:
  struct Group {
    uint32_t lanes = 0;
    Space space = Space::global;
    std::array<uintptr_t, 32> address;
    std::array<uint8_t, 32> bytes;
  };
  struct Site {
    std::array<uint32_t, 32> executions{};
    std::vector<Group> groups;
    uint32_t used = 0;
  };
  std::vector<Site> sites_;
  std::vector<int> touched_;
};

// The cost of one access of a warp, exposed for ldmatrix, which names its rows itself.
void count_global(const uintptr_t* addresses, const uint8_t* bytes, int count, SiteCounts& counts);
void count_shared(const uintptr_t* addresses, int bytes, int count, SiteCounts& counts);

}  // namespace cmaclip::emulator
