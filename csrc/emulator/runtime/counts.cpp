#include "counts.h"

#include <algorithm>

namespace cmaclip::emulator {

void WarpAccesses::reset() {
  for (int index : touched_) {
    sites_[index].executions.fill(0);
    sites_[index].used = 0;
  }
  touched_.clear();
}

void WarpAccesses::add(int site_index, int lane, uintptr_t address, int bytes, Space space) {
  if (static_cast<size_t>(site_index) >= sites_.size()) sites_.resize(site_index + 1);
  Site& site = sites_[site_index];
  const uint32_t execution = site.executions[lane]++;
  if (site.used == 0) touched_.push_back(site_index);
  if (execution >= site.used) {
    site.used = execution + 1;
    if (site.groups.size() < site.used) site.groups.resize(site.used);
    site.groups[execution].lanes = 0;
  }
  Group& group = site.groups[execution];
  group.lanes |= 1u << lane;
  group.space = space;
  group.address[lane] = address;
  group.bytes[lane] = static_cast<uint8_t>(bytes);
}

void WarpAccesses::flush(std::vector<SiteCounts>& counts) {
  for (int index : touched_) {
    Site& site = sites_[index];
    SiteCounts& total = counts[index];
    for (uint32_t execution = 0; execution < site.used; ++execution) {
      const Group& group = site.groups[execution];
      uintptr_t addresses[32];
      uint8_t bytes[32];
      int count = 0;
      int widest = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if (((group.lanes >> lane) & 1u) == 0) continue;
        addresses[count] = group.address[lane];
        bytes[count] = group.bytes[lane];
        widest = std::max(widest, static_cast<int>(bytes[count]));
        ++count;
      }
      if (group.space == Space::global) {
        count_global(addresses, bytes, count, total);
      } else {
        count_shared(addresses, widest, count, total);
      }
    }
  }
  reset();
}

void count_global(const uintptr_t* addresses, const uint8_t* bytes, int count, SiteCounts& counts) {
  std::array<std::pair<uintptr_t, uintptr_t>, 32> ranges;
  for (int i = 0; i < count; ++i) ranges[i] = {addresses[i], addresses[i] + bytes[i]};
  std::sort(ranges.begin(), ranges.begin() + count);
  uint64_t sectors = 0;
  uint64_t distinct_bytes = 0;
  uintptr_t next_sector = 0;
  uintptr_t next_byte = 0;
  for (int i = 0; i < count; ++i) {
    const auto [begin, end] = ranges[i];
    const uintptr_t first = std::max(begin >> 5, next_sector);
    const uintptr_t last = (end - 1) >> 5;
    if (last >= first) sectors += last - first + 1;
    next_sector = std::max(next_sector, last + 1);
    if (end > next_byte) distinct_bytes += end - std::max(begin, next_byte);
    next_byte = std::max(next_byte, end);
  }
  counts.global_accesses += 1;
  counts.sectors += sectors;
  counts.fewest_sectors += (distinct_bytes + 31) / 32;
}

// A wavefront serves each of the 32 four-byte banks once, a word asked for by several lanes counting once. Accesses of
// 8 bytes go by 16 lanes at a time, those of 16 bytes by 8.
void count_shared(const uintptr_t* addresses, int bytes, int count, SiteCounts& counts) {
  const int words = std::max(1, bytes / 4);
  const int lanes_at_once = 32 / words;
  counts.shared_accesses += 1;
  for (int start = 0; start < count; start += lanes_at_once) {
    const int end = std::min(count, start + lanes_at_once);
    std::array<uintptr_t, 32> distinct;
    int size = 0;
    for (int i = start; i < end; ++i) {
      for (int word = 0; word < words; ++word) distinct[size++] = (addresses[i] >> 2) + word;
    }
    std::sort(distinct.begin(), distinct.begin() + size);
    size = static_cast<int>(std::unique(distinct.begin(), distinct.begin() + size) - distinct.begin());
    std::array<int, 32> per_bank{};
    int most = 0;
    for (int i = 0; i < size; ++i) most = std::max(most, ++per_bank[distinct[i] & 31u]);
    counts.wavefronts += most;
    counts.fewest_wavefronts += 1;
  }
}

}  // namespace cmaclip::emulator
