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
// The backward: each block brings back kTokensPerSum tokens of a row and sums them.
constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarp;
constexpr int kTokensPerSum = 128;
constexpr int kTokensAtOnce = 4;

struct Shape {
  int rows, length, patches, width;
  // The rows of `packed`.
  int64_t capacity;
};

// How many parts of a row's tokens the backward sums apart.
inline int sums_per_row(int tokens) { return (tokens + kTokensPerSum - 1) / kTokensPerSum; }

// The tokens of one row.
struct Tokens {
  int text, image;
};

__device__ __forceinline__ Tokens tokens_of(Shape shape, const int* text_lengths, const bool* present, int64_t row) {
  return {present[2 * row] ? min(max(text_lengths[row], 0), shape.length) : 0,
          present[2 * row + 1] ? shape.patches : 0};
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
    row_ends(Shape shape, const int* __restrict__ text_lengths, const bool* __restrict__ present,
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
      const Tokens tokens = row < shape.rows ? tokens_of(shape, text_lengths, present, row) : Tokens{0, 0};
      ends[i] = warp_scan(tokens.text + tokens.image, lane);
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

// packed [capacity, D]; `types` [2, D] may be null. Grid (B, ceil((L + P) / kTokensPerBlock)), kThreads threads: a warp
// takes kTokensPerWarp of a row's L + P places. A place without a token clears one row of `packed` after the last token,
// so that the first B * (L + P) rows are written.
template <class T, int Count>
__global__ void __launch_bounds__(kThreads, 1)
    pack(Shape shape, const T* __restrict__ text, const T* __restrict__ image, const int* __restrict__ text_lengths,
         const bool* __restrict__ present, const T* __restrict__ types, const int* __restrict__ cu_seqlens,
         T* __restrict__ packed) {
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, places = shape.length + shape.patches;
  const int first = (blockIdx.y * kWarps + warp) * kTokensPerWarp;
  const Tokens tokens = tokens_of(shape, text_lengths, present, row);
  const int kept = tokens.text + tokens.image;
  const int64_t begin = cu_seqlens[row];
  // The free places of the rows before, and where the cleared rows begin.
  const int64_t free_begin = cu_seqlens[shape.rows] + row * places - begin - kept;
  for (int64_t d = lane * Count; d < shape.width; d += kWarp * Count) {
    Pack<T, Count> values[kTokensPerWarp];
#pragma unroll
    for (int t = 0; t < kTokensPerWarp; ++t) {
      const int place = first + t;
      values[t] = {};
      if (place < tokens.text)
        values[t] = load<Count>(text + (row * shape.length + place) * shape.width + d);
      else if (place < kept)
        values[t] = load<Count>(image + (row * shape.patches + place - tokens.text) * shape.width + d);
    }
#pragma unroll
    for (int t = 0; t < kTokensPerWarp; ++t) {
      const int place = first + t;
      if (types != nullptr && place < kept) {
        const Pack<T, Count> type = load<Count>(types + (place < tokens.text ? 0 : shape.width) + d);
#pragma unroll
        for (int i = 0; i < Count; ++i)
          values[t].values[i] = from_float<T>(to_float(values[t].values[i]) + to_float(type.values[i]));
      }
      const int64_t token = (place < kept ? begin : free_begin) + place;
      if (place < places && token < shape.capacity) store(packed + token * shape.width + d, values[t]);
    }
  }
}

// grad_text [B, L, D], grad_image [B, P, D], and sums [B * sums_per_row, 2, D] of the text and the image tokens among
// kTokensPerSum of a row. Grid (B, ceil(D / (kWarp * Count)), sums_per_row), kSumThreads threads: a lane takes Count
// columns, a warp every kSumWarps-th token.
template <class T, int Count>
__global__ void __launch_bounds__(kSumThreads, 1)
    unpack(Shape shape, const T* __restrict__ grad_packed, const int* __restrict__ text_lengths,
           const bool* __restrict__ present, const int* __restrict__ cu_seqlens, T* __restrict__ grad_text,
           T* __restrict__ grad_image, float* __restrict__ sums) {
  // Room for each lane's i-th element; so far apart that neighbouring columns lie in different banks.
  constexpr int kPlane = kWarp + kWarp / Count;
  __shared__ float partial[kSumWarps][2][kPlane * Count];
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, places = shape.length + shape.patches;
  const int first_column = blockIdx.y * kWarp * Count;
  const int64_t d = first_column + lane * Count;
  const Tokens tokens = tokens_of(shape, text_lengths, present, row);
  const int64_t begin = cu_seqlens[row];
  const int stop = min(places, static_cast<int>(blockIdx.z + 1) * kTokensPerSum);
  float text_sum[Count] = {}, image_sum[Count] = {};
  if (d < shape.width) {
    for (int first = blockIdx.z * kTokensPerSum + warp; first < stop; first += kSumWarps * kTokensAtOnce) {
      Pack<T, Count> grads[kTokensAtOnce];
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        const int place = first + t * kSumWarps, patch = place - shape.length;
        const bool is_text = patch < 0;
        const bool kept = place < stop && (is_text ? place < tokens.text : patch < tokens.image);
        const int64_t token = begin + (is_text ? place : tokens.text + patch);
        grads[t] = {};
        if (kept && token < shape.capacity) grads[t] = load<Count>(grad_packed + token * shape.width + d);
      }
#pragma unroll
      for (int t = 0; t < kTokensAtOnce; ++t) {
        const int place = first + t * kSumWarps, patch = place - shape.length;
        if (place >= stop) break;
        T* out = patch < 0 ? grad_text + (row * shape.length + place) * shape.width
                           : grad_image + (row * shape.patches + patch) * shape.width;
        store(out + d, grads[t]);
#pragma unroll
        for (int i = 0; i < Count; ++i) {
          const float grad = to_float(grads[t].values[i]);
          text_sum[i] += patch < 0 ? grad : 0;
          image_sum[i] += patch < 0 ? 0 : grad;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    partial[warp][0][i * kPlane + lane] = text_sum[i];
    partial[warp][1][i * kPlane + lane] = image_sum[i];
  }
  __syncthreads();
  float* out = sums + (row * gridDim.z + blockIdx.z) * 2 * shape.width + first_column;
  for (int at = threadIdx.x; at < 2 * kWarp * Count; at += kSumThreads) {
    const int type = at / (kWarp * Count), column = at % (kWarp * Count);
    if (first_column + column >= shape.width) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kSumWarps; ++w) total += partial[w][type][column % Count * kPlane + column / Count];
    out[type * shape.width + column] = total;
  }
}

// grad_types [2, D] from `count` sums, added in a fixed order. Grid (ceil(2 * D / kWarp)), kScanWarps warps: a lane
// takes a column, a warp every kScanWarps-th sum.
template <class T>
__global__ void __launch_bounds__(kScanWarps* kWarp, 1)
    add_sums(int columns, int64_t count, const float* __restrict__ sums, T* __restrict__ grad_types) {
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
  grad_types[column] = from_float<T>(total);
}

}  // namespace cmaclip::pack_tokens
