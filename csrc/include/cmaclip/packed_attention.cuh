// packed_attention: online softmax over tiles of keys (FlashAttention-2, arXiv 2307.08691), on packed rows.
//
// A block takes one tile of one row and one head, 16 queries (or keys, for their gradients) a warp, and streams the
// other side through two buffers. Gradients are sums of one block in a fixed order: keys recompute what queries have
// computed, and nothing is added atomically.
#pragma once

#include "cmaclip/tile.cuh"
#include "cmaclip/work_list.cuh"

namespace cmaclip::packed_attention {

using tile::kRowsPerWarp;
using tile::Layout;
using work_list::Item;
using work_list::Range;

constexpr int kMostWarps = 4;
// How finely rows are sorted by length.
constexpr int kTokensPerCost = 64;
// Scores stand in an exponent, where every bit of a float counts (tile.cuh, `multiply`).
constexpr int kScoreParts = 3;

// Tokens that are streamed at a time.
template <class T>
constexpr int kKeys = sizeof(T) == 4 ? 32 : 64;
template <class T>
constexpr int kGradTokens = sizeof(T) == 4 ? 16 : 32;

struct Strides {
  int64_t token, head;
};

// q, k and v may be strided; everything else is contiguous. `size` is the head size, a multiple of 16 bytes.
struct Shape {
  int rows, heads, size, queries, keys;
  bool causal;
  float scale;
  Strides q, k, v;
};

// Warps of a block: as the longest row needs, and in the gradients as the shared memory of small GPUs (99 KiB) allows.
__host__ __device__ constexpr int warps_for(int64_t longest, int most = kMostWarps) {
  return longest <= kRowsPerWarp ? 1 : longest <= 2 * kRowsPerWarp ? 2 : most;
}

template <class T, int Size>
__host__ __device__ constexpr int forward_bytes(int warps) {
  return Layout<T, Size>::elements(warps * kRowsPerWarp + 4 * kKeys<T>) * static_cast<int>(sizeof(T));
}

template <class T, int Size>
constexpr int kMostGradWarps = sizeof(T) == 4 && Size > 64 ? 2 : kMostWarps;

template <class T, int Size>
__host__ __device__ constexpr int backward_bytes(int warps) {
  const int tiles = Layout<T, Size>::elements(2 * warps * kRowsPerWarp + 4 * kGradTokens<T>);
  return tiles * static_cast<int>(sizeof(T)) + 4 * kGradTokens<T> * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ float power(float x) {
  return isa::exp2_approx(x * 1.4426950408889634f);
}

// How many of the row's keys a query sees: all, or those up to its own when the last query sees the last key.
__device__ __forceinline__ int visible_keys(const Shape& shape, Range queries, Range keys, int query) {
  const int all = keys.end - keys.begin;
  if (!shape.causal) return all;
  return max(0, min(all, query - queries.end + 1 + all));
}

// out [Tq, H, E] and lse [H, Tq]. Grid (items, heads), 32 threads a warp, forward_bytes of shared memory.
template <class T, int Size>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    forward(Shape shape, const Item* __restrict__ items, const int* __restrict__ ends_q,
            const int* __restrict__ ends_k, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
            T* __restrict__ out, float* __restrict__ lse) {
  constexpr int kColumns = kKeys<T>;
  const Item item = items[blockIdx.x];
  if (item.row < 0) return;
  const Range queries = work_list::tiled_range(ends_q, shape.rows, shape.queries, item.row);
  const Range keys = work_list::other_range(ends_k, shape.rows, item.row);
  const int head = blockIdx.y, lane = threadIdx.x % kWarp;
  const int block_rows = blockDim.x / kWarp * kRowsPerWarp, row = threadIdx.x / kWarp * kRowsPerWarp;
  const int first = item.first + row;
  T* q_tile = isa::dynamic_shared<T>();
  T* k_tiles = q_tile + Layout<T, Size>::elements(block_rows);
  T* v_tiles = k_tiles + Layout<T, Size>::elements(2 * kColumns);

  q += head * shape.q.head, k += head * shape.k.head, v += head * shape.v.head;
  const int visible = visible_keys(shape, queries, keys, min(item.first + block_rows, queries.end) - 1);
  const auto start_keys = [&](int from, int buffer) {
    const int at = Layout<T, Size>::elements(buffer * kColumns);
    tile::start_copy<T, Size>(k_tiles + at, kColumns, k, shape.k.token, keys.begin + from, keys.begin + visible,
                              shape.size);
    tile::start_copy<T, Size>(v_tiles + at, kColumns, v, shape.v.token, keys.begin + from, keys.begin + visible,
                              shape.size);
    isa::cp_async_commit();
  };
  if (visible > 0) {
    tile::start_copy<T, Size>(q_tile, block_rows, q, shape.q.token, item.first, queries.end, shape.size);
    start_keys(0, 0);
  }

  const int warp_visible =
      first < queries.end ? visible_keys(shape, queries, keys, min(first + kRowsPerWarp, queries.end) - 1) : 0;
  // Of this lane's two rows, lane / 4 and eight below: the keys they see, the running maximum and sum.
  int limit[2];
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) limit[r] = visible_keys(shape, queries, keys, first + lane / 4 + 8 * r);
  float sum[Size / 8][4] = {};
  for (int from = 0, buffer = 0; from < visible; from += kColumns, buffer ^= 1) {
    isa::cp_async_wait<0>();
    __syncthreads();
    if (from + kColumns < visible) start_keys(from + kColumns, buffer ^ 1);
    if (from >= warp_visible) continue;
    const int columns = min(kColumns, warp_visible - from), at = Layout<T, Size>::elements(buffer * kColumns);
    float scores[kColumns / 8][4];
    tile::multiply_rows<T, Size, kColumns, kScoreParts>(scores, q_tile, row, k_tiles + at, columns);
    float tile_most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = from + n * 8 + lane % 4 * 2 + i % 2;
        scores[n][i] = key < limit[i / 2] ? scores[n][i] * shape.scale : -INFINITY;
        tile_most[i / 2] = fmaxf(tile_most[i / 2], scores[n][i]);
      }
    }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tile_most[r] = fmaxf(tile_most[r], __shfl_xor_sync(kAllLanes, tile_most[r], 1));
      tile_most[r] = fmaxf(tile_most[r], __shfl_xor_sync(kAllLanes, tile_most[r], 2));
      const float before = most[r];
      most[r] = fmaxf(before, tile_most[r]);
      // A row that has seen no key yet has nothing to rescale, and no maximum to subtract.
      shift[r] = most[r] == -INFINITY ? 0 : most[r];
      const float rescale = power(before - shift[r]);
      total[r] *= rescale;
#pragma unroll
      for (int n = 0; n < Size / 8; ++n) {
        sum[n][2 * r] *= rescale;
        sum[n][2 * r + 1] *= rescale;
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = power(scores[n][i] - shift[i / 2]);
        total[i / 2] += scores[n][i];
      }
    }
    tile::add_weighted_rows<T, Size, kColumns>(sum, scores, v_tiles + at, columns);
  }
  if (first >= queries.end) return;

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
    const float share = total[r] == 0 ? 0 : 1 / total[r];
#pragma unroll
    for (int n = 0; n < Size / 8; ++n) {
      sum[n][2 * r] *= share;
      sum[n][2 * r + 1] *= share;
    }
    const int query = first + lane / 4 + 8 * r;
    if (lane % 4 == 0 && query < queries.end)
      lse[int64_t{head} * shape.queries + query] = total[r] == 0 ? -INFINITY : most[r] + logf(total[r]);
  }
  tile::store_rows<T, Size>(q_tile, row, sum, out + head * shape.size, int64_t{shape.heads} * shape.size, first,
                            queries.end, shape.size);
}

// delta [H, Tq] = the sum of out * grad_out over a head, less grad_lse, which may be null. Lanes in groups that read
// 128 elements; grid (ceil(Tq * 128 / (threads * elements of an access)), heads).
template <class T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    backward_delta(Shape shape, const T* __restrict__ out, const T* __restrict__ grad_out,
                   const float* __restrict__ grad_lse, float* __restrict__ delta) {
  constexpr int kLanes = 128 / kPerAccess<T>;
  const int head = blockIdx.y, lane = threadIdx.x % kLanes;
  // Lanes may be more than an int counts, queries are not.
  const int query = static_cast<int>((int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kLanes);
  float sum = 0;
  if (query < shape.queries && lane * kPerAccess<T> < shape.size) {
    const int64_t at = (int64_t{query} * shape.heads + head) * shape.size + lane * kPerAccess<T>;
    const auto a = load<kPerAccess<T>>(out + at), b = load<kPerAccess<T>>(grad_out + at);
#pragma unroll
    for (int i = 0; i < kPerAccess<T>; ++i) sum += to_float(a.values[i]) * to_float(b.values[i]);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (query >= shape.queries || lane != 0) return;
  const int64_t at = int64_t{head} * shape.queries + query;
  delta[at] = grad_lse == nullptr ? sum : sum - grad_lse[at];
}

// ByKeys false: grad_tiled [Tq, H, E] is the gradient of q; the tiled side is (q, grad_out), the streamed one (k, v).
// ByKeys true: grad_tiled and grad_second [Tk, H, E] are those of k and v; the sides change places.
// Grid (items of the tiled side, heads), 32 threads a warp, backward_bytes of shared memory.
template <class T, int Size, bool ByKeys>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    backward(Shape shape, const Item* __restrict__ items, const int* __restrict__ ends_q,
             const int* __restrict__ ends_k, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
             const T* __restrict__ grad_out, const float* __restrict__ lse, const float* __restrict__ delta,
             T* __restrict__ grad_tiled, T* __restrict__ grad_second) {
  constexpr int kColumns = kGradTokens<T>;
  const Item item = items[blockIdx.x];
  if (item.row < 0) return;
  const Range tiled = ByKeys ? work_list::tiled_range(ends_k, shape.rows, shape.keys, item.row)
                             : work_list::tiled_range(ends_q, shape.rows, shape.queries, item.row);
  const Range streamed = work_list::other_range(ByKeys ? ends_q : ends_k, shape.rows, item.row);
  const Range queries = ByKeys ? streamed : tiled, keys = ByKeys ? tiled : streamed;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp;
  const int block_rows = blockDim.x / kWarp * kRowsPerWarp, row = threadIdx.x / kWarp * kRowsPerWarp;
  const int first = item.first + row;
  T* tiled_a = isa::dynamic_shared<T>();
  T* tiled_b = tiled_a + Layout<T, Size>::elements(block_rows);
  T* streamed_a = tiled_b + Layout<T, Size>::elements(block_rows);
  T* streamed_b = streamed_a + Layout<T, Size>::elements(2 * kColumns);
  // Of two buffers of streamed queries, their log-sum-exp and their delta.
  float* query_lse = reinterpret_cast<float*>(streamed_b + Layout<T, Size>::elements(2 * kColumns));
  float* query_delta = query_lse + 2 * kColumns;

  q += head * shape.q.head, k += head * shape.k.head, v += head * shape.v.head, grad_out += head * shape.size;
  lse += int64_t{head} * shape.queries, delta += int64_t{head} * shape.queries;
  const int64_t grad_stride = int64_t{shape.heads} * shape.size;
  // Streamed tokens from `begin` to before `end`, counted in the row: what the tile's tokens see, or are seen by.
  const int last = min(item.first + block_rows, tiled.end) - 1;
  const int lead = shape.causal ? (keys.end - keys.begin) - (queries.end - queries.begin) : 0;
  const auto first_seeing = [&](int token) { return ByKeys && shape.causal ? max(0, token - tiled.begin - lead) : 0; };
  const int begin = first_seeing(item.first), warp_begin = first_seeing(first);
  const int end = ByKeys ? streamed.end - streamed.begin : visible_keys(shape, queries, keys, last);

  const auto start_streamed = [&](int from, int buffer) {
    const int at = Layout<T, Size>::elements(buffer * kColumns);
    tile::start_copy<T, Size>(streamed_a + at, kColumns, ByKeys ? q : k, ByKeys ? shape.q.token : shape.k.token,
                              streamed.begin + from, streamed.begin + end, shape.size);
    tile::start_copy<T, Size>(streamed_b + at, kColumns, ByKeys ? grad_out : v, ByKeys ? grad_stride : shape.v.token,
                              streamed.begin + from, streamed.begin + end, shape.size);
    isa::cp_async_commit();
    if (ByKeys && threadIdx.x < kColumns) {
      const int query = from + static_cast<int>(threadIdx.x);
      const float sum = query < end ? lse[streamed.begin + query] : 0;
      // A query that sees no key has no probabilities: minus infinity would make them infinite.
      query_lse[buffer * kColumns + threadIdx.x] = sum == -INFINITY ? INFINITY : sum;
      query_delta[buffer * kColumns + threadIdx.x] = query < end ? delta[streamed.begin + query] : 0;
    }
  };
  if (begin < end) {
    tile::start_copy<T, Size>(tiled_a, block_rows, ByKeys ? k : q, ByKeys ? shape.k.token : shape.q.token, item.first,
                              tiled.end, shape.size);
    tile::start_copy<T, Size>(tiled_b, block_rows, ByKeys ? v : grad_out, ByKeys ? shape.v.token : grad_stride,
                              item.first, tiled.end, shape.size);
    start_streamed(begin, 0);
  }

  const int warp_last = min(first + kRowsPerWarp, tiled.end) - 1;
  const int warp_end = first >= tiled.end ? 0 : ByKeys ? end : visible_keys(shape, queries, keys, warp_last);
  // Of this lane's two rows, where these are queries: log-sum-exp and delta.
  float row_lse[2] = {}, row_delta[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first + lane / 4 + 8 * r;
    if (ByKeys || query >= tiled.end) continue;
    row_lse[r] = lse[query] == -INFINITY ? INFINITY : lse[query];
    row_delta[r] = delta[query];
  }
  float grad[Size / 8][4] = {}, second[ByKeys ? Size / 8 : 1][4] = {};
  for (int from = begin, buffer = 0; from < end; from += kColumns, buffer ^= 1) {
    isa::cp_async_wait<0>();
    __syncthreads();
    if (from + kColumns < end) start_streamed(from + kColumns, buffer ^ 1);
    if (from >= warp_end || from + kColumns <= warp_begin) continue;
    const int columns = min(kColumns, warp_end - from), at = Layout<T, Size>::elements(buffer * kColumns);
    float powers[kColumns / 8][4], slopes[kColumns / 8][4];
    tile::multiply_rows<T, Size, kColumns, kScoreParts>(powers, tiled_a, row, streamed_a + at, columns);
    tile::multiply_rows<T, Size, kColumns, 2>(slopes, tiled_b, row, streamed_b + at, columns);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2, other = from + column;
        const int own = first - tiled.begin + lane / 4 + i / 2 * 8;
        const int query = ByKeys ? other : own, key = ByKeys ? own : other;
        const bool seen = other < end && (!shape.causal || key <= query + lead);
        const int stat = buffer * kColumns + column;
        const float sum = ByKeys ? query_lse[stat] : row_lse[i / 2];
        const float mean = ByKeys ? query_delta[stat] : row_delta[i / 2];
        powers[n][i] = seen ? power(powers[n][i] * shape.scale - sum) : 0;
        slopes[n][i] = powers[n][i] * (slopes[n][i] - mean) * shape.scale;
      }
    }
    if constexpr (ByKeys)
      tile::add_weighted_rows<T, Size, kColumns>(second, powers, streamed_b + at, columns);
    tile::add_weighted_rows<T, Size, kColumns>(grad, slopes, streamed_a + at, columns);
  }
  if (first >= tiled.end) return;
  tile::store_rows<T, Size>(tiled_a, row, grad, grad_tiled + head * shape.size, grad_stride, first, tiled.end,
                            shape.size);
  if constexpr (ByKeys)
    tile::store_rows<T, Size>(tiled_b, row, second, grad_second + head * shape.size, grad_stride, first, tiled.end,
                              shape.size);
}

}  // namespace cmaclip::packed_attention
