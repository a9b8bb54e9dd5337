// The blocks' work on a packed batch: the rows cut into tiles of tokens, those with most to do first, so that no short
// row waits for a long one and the last blocks to run are short.
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::work_list {

// A tile: from the token `first` of the row `row` on; no work where `row` is negative.
struct alignas(8) Item {
  int row, first;
};

// From the token `begin` to before `end`.
struct Range {
  int begin, end;
};

constexpr int kCosts = 64;

// At least as many items as a batch of that many tokens can have.
__host__ __device__ constexpr int most_items(int64_t tokens, int rows, int tile) {
  return static_cast<int>(tokens / tile) + rows + 1;
}

// Tokens past the last row are one more row, the last, which has nothing to attend to.
__device__ __forceinline__ Range tiled_range(const int* ends, int rows, int tokens, int row) {
  return {ends[row], row < rows ? ends[row + 1] : tokens};
}

__device__ __forceinline__ Range other_range(const int* ends, int rows, int row) {
  return row < rows ? Range{ends[row], ends[row + 1]} : Range{0, 0};
}

// Writes all `limit` items. A row's cost is its number of other tokens: keys where queries are tiled, and vice versa.
// One warp; a stable counting sort by whole TokensPerCost, so the order depends on the lengths only.
template <int TokensPerCost>
__global__ void __launch_bounds__(kWarp)
    plan(int rows, int tokens, int tile, int limit, const int* __restrict__ tiled_ends,
         const int* __restrict__ other_ends, Item* __restrict__ items) {
  __shared__ int next[kCosts];
  const int lane = threadIdx.x;
  const auto cost_of = [&](int row) {
    const Range other = other_range(other_ends, rows, row);
    return min((other.end - other.begin + TokensPerCost - 1) / TokensPerCost, kCosts - 1);
  };
  const auto count_of = [&](int row) {
    const Range tiled = tiled_range(tiled_ends, rows, tokens, row);
    return (tiled.end - tiled.begin + tile - 1) / tile;
  };
  for (int cost = lane; cost < kCosts; cost += kWarp) next[cost] = 0;
  __syncwarp();
  for (int row = lane; row <= rows; row += kWarp) atomicAdd(&next[cost_of(row)], count_of(row));
  __syncwarp();
  // Each lane takes two neighbouring costs; the greatest come first.
  const int high = kCosts - 1 - 2 * lane, low = high - 1;
  const int high_count = next[high], low_count = next[low];
  int before = high_count + low_count;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += other;
  }
  const int total = __shfl_sync(kAllLanes, before, kWarp - 1);
  before -= high_count + low_count;
  __syncwarp();
  next[high] = before;
  next[low] = before + high_count;
  __syncwarp();
  for (int base = 0; base <= rows; base += kWarp) {
    const int row = base + lane;
    const bool exists = row <= rows;
    const int cost = exists ? cost_of(row) : 0, count = exists ? count_of(row) : 0;
    unsigned same = kAllLanes;
#pragma unroll
    for (int bit = 0; 1 << bit < kCosts; ++bit) {
      const unsigned set = __ballot_sync(kAllLanes, cost >> bit & 1);
      same &= cost >> bit & 1 ? set : ~set;
    }
    int at = next[cost];
#pragma unroll
    for (int l = 0; l < kWarp; ++l) {
      const int theirs = __shfl_sync(kAllLanes, count, l);
      if (l < lane && same >> l & 1) at += theirs;
    }
    __syncwarp();
    // The last lane of each cost knows where the next row of that cost begins.
    if (same >> lane == 1) next[cost] = at + count;
    __syncwarp();
    if (exists) {
      const int first = tiled_ends[row];
      for (int i = 0; i < count; ++i) items[at + i] = {row, first + i * tile};
    }
  }
  for (int i = total + lane; i < limit; i += kWarp) items[i] = {-1, 0};
}

}  // namespace cmaclip::work_list
