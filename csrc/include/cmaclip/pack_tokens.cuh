// pack_tokens: the tokens of each row's text and image, without padding, as one sequence (paper, figure 1).
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::pack_tokens {

// The scan over the rows is one block's; each of its turns takes kScanItems rows a thread.
constexpr int kScanWarps = 32;
constexpr int kScanItems = 4;
// The tokens of a warp, and of a block, of the forward.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokensPerWarp = 4;
constexpr int kTokensPerBlock = kWarps * kTokensPerWarp;
// The backward: each block brings back kTokensPerSum source tokens and sums them.
constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarp;
constexpr int kTokensPerSum = 128;
constexpr int kTokensAtOnce = 4;

struct Shape {
  int rows, texts, images, width;
  // The rows of `packed`.
  int64_t capacity;
};

// What a row takes of one source, kept within it.
struct Span {
  int first, count;

  __device__ __forceinline__ bool holds(int64_t begin, int64_t end) const {
    return count > 0 && first < end && first + count > begin;
  }
};

__device__ __forceinline__ Span span_of(Shape shape, const int* starts, const int* counts, int64_t row, int modality) {
  const int size = modality == 0 ? shape.texts : shape.images;
  const int first = min(max(starts[2 * row + modality], 0), size);
  return {first, min(max(counts[2 * row + modality], 0), size - first)};
}

// The sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

// cu_seqlens [B + 1]. One block of kScanWarps warps.
__global__ void __launch_bounds__(kScanWarps* kWarp, 1)
    row_ends(Shape shape, const int* __restrict__ starts, const int* __restrict__ counts,
             int* __restrict__ cu_seqlens) {
  constexpr int kThreads = kScanWarps * kWarp, kTotals = kScanWarps * kScanItems;
  __shared__ __align__(16) int totals[kTotals];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int before = 0;
  if (threadIdx.x == 0) cu_seqlens[0] = 0;
  for (int64_t first = 0; first < shape.rows; first += kThreads * kScanItems) {
    int ends[kScanItems];
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      const int64_t row = first + i * kThreads + threadIdx.x;
      int tokens = 0;
      if (row < shape.rows)
        tokens = span_of(shape, starts, counts, row, 0).count + span_of(shape, starts, counts, row, 1).count;
      ends[i] = warp_scan(tokens, lane);
      if (lane == kWarp - 1) totals[i * kScanWarps + warp] = ends[i];
    }
    __syncthreads();
    // One warp turns the warps' totals into sums up to each; a lane takes kTotals / kWarp of them.
    if (warp == 0) {
      auto part = load<kTotals / kWarp>(totals + lane * (kTotals / kWarp));
#pragma unroll
      for (int i = 1; i < kTotals / kWarp; ++i) part.values[i] += part.values[i - 1];
      const int last = part.values[kTotals / kWarp - 1], earlier = warp_scan(last, lane) - last;
#pragma unroll
      for (int i = 0; i < kTotals / kWarp; ++i) part.values[i] += earlier;
      isa::store_shared(totals + lane * (kTotals / kWarp), part);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      const int64_t row = first + i * kThreads + threadIdx.x;
      const int at = i * kScanWarps + warp;
      if (row < shape.rows) cu_seqlens[row + 1] = before + ends[i] + (at > 0 ? totals[at - 1] : 0);
    }
    before += totals[kTotals - 1];
    __syncthreads();
  }
}

// packed [capacity, D]; `types` [2, D] may be null. Grid (ceil(capacity / kTokensPerBlock)), kThreads threads: a warp
// takes kTokensPerWarp tokens. What follows the last row is 0.
template <class T, int Count>
__global__ void __launch_bounds__(kThreads, 1)
    pack(Shape shape, const T* __restrict__ text, const T* __restrict__ image, const int* __restrict__ starts,
         const int* __restrict__ counts, const T* __restrict__ types, const int* __restrict__ cu_seqlens,
         T* __restrict__ packed) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = (int64_t{blockIdx.x} * kWarps + warp) * kTokensPerWarp;
  // The row of the first token is the number of rows that end at or before it.
  int row = 0, above = shape.rows;
  while (row < above) {
    const int middle = (row + above) / 2;
    if (cu_seqlens[middle + 1] <= begin)
      row = middle + 1;
    else
      above = middle;
  }
  // Where each token comes from; null past the last row.
  const T* sources[kTokensPerWarp];
  bool is_text[kTokensPerWarp];
#pragma unroll
  for (int t = 0; t < kTokensPerWarp; ++t) {
    while (row < shape.rows && cu_seqlens[row + 1] <= begin + t) ++row;
    sources[t] = nullptr;
    is_text[t] = false;
    if (row < shape.rows) {
      const Span of_text = span_of(shape, starts, counts, row, 0);
      const int64_t place = begin + t - cu_seqlens[row];
      is_text[t] = place < of_text.count;
      if (is_text[t])
        sources[t] = text + (of_text.first + place) * shape.width;
      else
        sources[t] = image + (span_of(shape, starts, counts, row, 1).first + place - of_text.count) * shape.width;
    }
  }
  for (int64_t d = lane * Count; d < shape.width; d += kWarp * Count) {
    Pack<T, Count> values[kTokensPerWarp];
#pragma unroll
    for (int t = 0; t < kTokensPerWarp; ++t) {
      values[t] = {};
      if (sources[t] != nullptr) values[t] = load<Count>(sources[t] + d);
    }
#pragma unroll
    for (int t = 0; t < kTokensPerWarp; ++t) {
      if (types != nullptr && sources[t] != nullptr) {
        const Pack<T, Count> type = load<Count>(types + (is_text[t] ? 0 : shape.width) + d);
#pragma unroll
        for (int i = 0; i < Count; ++i)
          values[t].values[i] = from_float<T>(to_float(values[t].values[i]) + to_float(type.values[i]));
      }
      if (begin + t < shape.capacity) store(packed + (begin + t) * shape.width + d, values[t]);
    }
  }
}

// grad_source [S, D] of one modality, and sums [ceil(S / kTokensPerSum), D] of its tokens. A token's gradient is the sum
// over the rows that hold it, in their order. Grid (ceil(S / kTokensPerSum), ceil(D / (kWarp * Count))), kSumThreads
// threads: a lane takes Count columns, a warp every kSumWarps-th token.
template <class T, int Count>
__global__ void __launch_bounds__(kSumThreads, 1)
    unpack(Shape shape, int modality, const T* __restrict__ grad_packed, const int* __restrict__ starts,
           const int* __restrict__ counts, const int* __restrict__ cu_seqlens, T* __restrict__ grad_source,
           float* __restrict__ sums) {
  // Room for each lane's i-th element; so far apart that neighbouring columns lie in different banks.
  constexpr int kPlane = kWarp + kWarp / Count;
  __shared__ float partial[kSumWarps][kPlane * Count];
  __shared__ int first_rows[kSumWarps], last_rows[kSumWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int sources = modality == 0 ? shape.texts : shape.images;
  const int first_column = blockIdx.y * kWarp * Count;
  const int64_t d = first_column + lane * Count;
  const int64_t begin = int64_t{blockIdx.x} * kTokensPerSum;
  const int64_t stop = begin + kTokensPerSum < sources ? begin + kTokensPerSum : sources;

  // The first and the last row that hold a token of this block; all others are passed over.
  int first_row = shape.rows, last_row = -1;
  for (int row = threadIdx.x; row < shape.rows; row += kSumThreads)
    if (span_of(shape, starts, counts, row, modality).holds(begin, stop)) {
      first_row = min(first_row, row);
      last_row = row;
    }
  first_row = __reduce_min_sync(kAllLanes, first_row);
  last_row = __reduce_max_sync(kAllLanes, last_row);
  if (lane == 0) {
    first_rows[warp] = first_row;
    last_rows[warp] = last_row;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSumWarps; ++w) {
    first_row = min(first_row, first_rows[w]);
    last_row = max(last_row, last_rows[w]);
  }

  float sum[Count] = {};
  for (int64_t first = begin + warp; first < stop; first += kSumWarps * kTokensAtOnce) {
    float grads[kTokensAtOnce][Count] = {};
    for (int rows = first_row; rows <= last_row; rows += kWarp) {
      // Each lane looks at one of these rows.
      const int mine = rows + lane;
      Span span = {0, 0};
      int64_t shift = 0;
      if (mine <= last_row) {
        span = span_of(shape, starts, counts, mine, modality);
        const int before = modality == 0 ? 0 : span_of(shape, starts, counts, mine, 0).count;
        shift = int64_t{cu_seqlens[mine]} + before - span.first;
      }
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        const int64_t token = first + t * kSumWarps;
        unsigned holders = __ballot_sync(kAllLanes, token < stop && span.holds(token, token + 1));
        for (; holders != 0; holders &= holders - 1) {
          const int64_t at = token + __shfl_sync(kAllLanes, shift, __ffs(holders) - 1);
          if (d < shape.width && at < shape.capacity) {
            const Pack<T, Count> grad = load<Count>(grad_packed + at * shape.width + d);
#pragma unroll
            for (int i = 0; i < Count; ++i) grads[t][i] += to_float(grad.values[i]);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; ++t) {
      const int64_t token = first + t * kSumWarps;
      if (token >= stop || d >= shape.width) continue;
      Pack<T, Count> grad;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        grad.values[i] = from_float<T>(grads[t][i]);
        sum[i] += grads[t][i];
      }
      store(grad_source + token * shape.width + d, grad);
    }
  }
#pragma unroll
  for (int i = 0; i < Count; ++i) partial[warp][i * kPlane + lane] = sum[i];
  __syncthreads();
  for (int column = threadIdx.x; column < kWarp * Count; column += kSumThreads) {
    if (first_column + column >= shape.width) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kSumWarps; ++w) total += partial[w][column % Count * kPlane + column / Count];
    sums[int64_t{blockIdx.x} * shape.width + first_column + column] = total;
  }
}

// One modality's grad_type [D] from `count` sums, added in a fixed order. Grid (ceil(D / kWarp)), kScanWarps warps: a
// lane takes a column, a warp every kScanWarps-th sum.
template <class T>
__global__ void __launch_bounds__(kScanWarps* kWarp, 1)
    add_sums(int columns, int64_t count, const float* __restrict__ sums, T* __restrict__ grad_type) {
  __shared__ float partial[kScanWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = blockIdx.x * kWarp + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kScanWarps) total += sums[i * columns + column];
  }
  partial[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  total = 0;
#pragma unroll
  for (int w = 0; w < kScanWarps; ++w) total += partial[w][lane];
  grad_type[column] = from_float<T>(total);
}

}  // namespace cmaclip::pack_tokens
