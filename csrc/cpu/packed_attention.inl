// The kernels of packed_attention, compiled once for each instruction set.
//
// Scores are held transposed, keys by queries, so that a lane is a query: maxima and sums over keys need no shuffles,
// and keys and values are multiplied in the layout that they have.

#include "tile.inl"

constexpr float kLog2E = 1.44269504f;

template <int C, bool Across>
__attribute__((noinline)) void multiply_columns(int64_t columns, int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool add, const float* factor,
                                                Ahead& ahead) {
  if constexpr (C > 1)
    if (columns < C)
      return multiply_columns<C - 1, Across>(columns, rows, depth, a, lda, b, ldb, c, ldc, add, factor, ahead);
  constexpr int kRows = tile_rows(C);
  for (int64_t r = 0; r < rows; r += kRows) {
    ahead.step();
    multiply_rows<kRows, C, Across>(rows - r < kRows ? rows - r : kRows, depth, a + (Across ? r : r * lda), lda, b, ldb,
                                    c + r * ldc, ldc, add, factor == nullptr ? nullptr : factor + r);
  }
}

// As multiply_tile, for any number of rows, and of columns in whole vectors.
template <bool Across>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc, Ahead& ahead, bool add, const float* factor = nullptr) {
  int64_t vectors = columns / kLanes;
  for (int64_t groups = (vectors + kTileColumns - 1) / kTileColumns; groups > 0; --groups) {
    const int64_t width = (vectors + groups - 1) / groups;
    multiply_columns<kTileColumns, Across>(width, rows, depth, a, lda, b, ldb, c, ldc, add, factor, ahead);
    vectors -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

// Copies rows of `size` elements to rows `padded` apart, filled up with 0 to whole vectors.
template <typename T>
__attribute__((noinline)) void pack(int64_t rows, int64_t size, const T* from, int64_t stride, float* to, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < size; e += kLanes) store(to + r * padded + e, load(from + r * stride + e, size - e));
}

// The same, transposed and multiplied by `factor`: to [padded, width], 0 where there is no row.
template <typename T>
__attribute__((noinline)) void pack_transposed(int64_t rows, int64_t size, const T* from, int64_t stride, float factor, float* to,
                     int64_t width) {
  for (int64_t e = 0; e < size; e += kLanes)
    for (int64_t r = 0; r < width; r += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? factor * load(from + (r + i) * stride + e, size - e) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (e + i) * width + r, block[i]);
    }
}

template <typename T>
__attribute__((noinline)) void unpack(int64_t rows, int64_t size, const float* from, int64_t padded, float factor, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < size; e += kLanes)
      store(to + r * stride + e, factor * load(from + r * padded + e), size - e);
}

// A block of scores: keys from `key`, queries from `query`, [keys, width]. A query sees the keys up to its own number
// plus `offset`.
struct ScoreBlock {
  int64_t key, keys, query, width, offset;

  // Where query `lane` of vector `j` sees key k.
  IntVec visible(int64_t k, int64_t j) const {
    return lane_numbers() + (int32_t)(query + j + offset - key - k) >= 0;
  }
};

// Scores that the mask hides become minus infinity.
inline void hide(const ScoreBlock& block, float* scores) {
  const int64_t first = block.query + block.offset + 1 - block.key;
  for (int64_t k = first > 0 ? first : 0; k < block.keys; ++k)
    for (int64_t j = 0; j < block.width; j += kLanes) {
      float* const at = scores + k * block.width + j;
      store(at, block.visible(k, j) ? load(at) : splat(-INFINITY));
    }
}

// Scores become exponentials; the maxima and sums of their queries so far are brought up to date, and `factor` says by
// what to multiply the sums of values.
__attribute__((noinline)) inline void online_softmax(const ScoreBlock& block, float* scores, float* most, float* total, float* factor) {
  const int64_t width = block.width, size = block.keys * width;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec before = load(most + j);
    Vec even = before, odd = before;
    int64_t at = j;
    for (; at + width < size; at += 2 * width) {
      even = greater(load(scores + at), even);
      odd = greater(load(scores + at + width), odd);
    }
    if (at < size) even = greater(load(scores + at), even);
    const Vec now = greater(even, odd);
    const Vec base = now == -INFINITY ? Vec{} : now;
    Vec added{};
    for (at = j; at < size; at += width) {
      const Vec p = power_of_two((load(scores + at) - base) * kLog2E);
      store(scores + at, p);
      added += p;
    }
    const Vec shrink = power_of_two((before - base) * kLog2E);
    store(most + j, now);
    store(factor + j, shrink);
    store(total + j, load(total + j) * shrink + added);
  }
}

// Scores become probabilities, and `grads`, the gradients of the probabilities, those of the unscaled scores.
__attribute__((noinline)) inline void softmax_backward(const ScoreBlock& block, float* scores, float* grads, const float* lse,
                             const float* delta) {
  const int64_t width = block.width, size = block.keys * width;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec query_lse = load(lse + j), query_delta = load(delta + j);
    for (int64_t at = j; at < size; at += width) {
      const Vec p = power_of_two((load(scores + at) - query_lse) * kLog2E);
      store(scores + at, p);
      store(grads + at, p * (load(grads + at) - query_delta));
    }
  }
}

inline int64_t padded_size(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// How far apart packed rows lie: where tiles take a row in parts, by an odd number of cache lines, so that the same part
// of all rows spreads over the whole first-level cache.
inline int64_t row_stride(int64_t size) {
  const int64_t lines = (size + 15) / 16;
  return 16 * (lines * 16 > kTileColumns * kLanes ? lines | 1 : lines);
}

inline int64_t forward_buffer(int64_t size) {
  const int64_t padded = row_stride(size);
  return kQueryChunk * (2 * padded + 3) + kKeyBlock * (2 * padded + kQueryBlock);
}

// Queries query_begin:query_end, at most kQueryChunk. `next` is what the item after this one begins with.
template <typename T>
void attention(const Head<T>& head, int64_t query_begin, int64_t query_end, const Ahead& next, T* out, float* lse,
               float* buffer) {
  const int64_t columns = padded_size(head.size), padded = row_stride(head.size), queries = query_end - query_begin;
  float* const transposed = buffer;
  float* const sums = transposed + kQueryChunk * padded;
  float* const keys = sums + kQueryChunk * padded;
  float* const values = keys + kKeyBlock * padded;
  float* const scores = values + kKeyBlock * padded;
  float* const most = scores + kKeyBlock * kQueryBlock;
  float* const total = most + kQueryChunk;
  float* const factor = total + kQueryChunk;
  const Blocks blocks(queries, kQueryBlock, kQueryUnit);
  for (int64_t i = 0; i < kQueryChunk; ++i) most[i] = -INFINITY, total[i] = 0;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = blocks.begin(b);
    pack_transposed(blocks.end(b) - begin, head.size, head.q + (query_begin + begin) * head.q_stride, head.q_stride,
                    head.scale, transposed + begin * padded, blocks.width(b));
  }
  const int64_t seen = visible_keys(query_end - 1, head.offset, head.keys);
  const Blocks key_blocks(seen, kKeyBlock, 1);
  if (seen == 0) std::memset(sums, 0, queries * padded * sizeof(float));
  for (int64_t kb = 0; kb < key_blocks.count; ++kb) {
    const int64_t key = key_blocks.begin(kb), count = key_blocks.end(kb) - key;
    pack(count, head.size, head.k + key * head.k_stride, head.k_stride, keys, padded);
    pack(count, head.size, head.v + key * head.v_stride, head.v_stride, values, padded);
    Ahead ahead = next;
    if (kb + 1 < key_blocks.count) {
      const int64_t key_after = key_blocks.end(kb), count_after = key_blocks.end(kb + 1) - key_after;
      ahead = {};
      ahead.add(count_after, head.size, head.k + key_after * head.k_stride, head.k_stride);
      ahead.add(count_after, head.size, head.v + key_after * head.v_stride, head.v_stride);
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t begin = blocks.begin(b), end = blocks.end(b), width = blocks.width(b);
      const int64_t block_keys = visible_keys(query_begin + end - 1, head.offset, key + count) - key;
      if (block_keys <= 0) {
        if (kb == 0) std::memset(sums + begin * padded, 0, (end - begin) * padded * sizeof(float));
        continue;
      }
      const ScoreBlock block{key, block_keys, query_begin + begin, width, head.offset};
      multiply<false>(block_keys, width, head.size, keys, padded, transposed + begin * padded, width, scores, width,
                      ahead, false);
      hide(block, scores);
      online_softmax(block, scores, most + begin, total + begin, factor + begin);
      multiply<true>(end - begin, columns, block_keys, scores, width, values, padded, sums + begin * padded, padded,
                     ahead, kb > 0, factor + begin);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const bool none = total[i] == 0;
    unpack(1, head.size, sums + i * padded, padded, none ? 0 : 1 / total[i],
           out + (query_begin + i) * head.out_stride, 0);
    lse[query_begin + i] = none ? -INFINITY : most[i] + std::log(total[i]);
  }
}

inline int64_t backward_buffer(int64_t size) {
  const int64_t padded = row_stride(size);
  return 4 * key_chunk(size) * padded + kQueryBlock * (5 * padded + 2) + 2 * kKeyBlock * kQueryBlock;
}

// delta[i] = the dot product of out and grad_out, of up to kLanes queries.
template <typename T>
Vec dots(int64_t rows, int64_t size, const T* a, const T* b, int64_t stride) {
  Vec parts[kLanes] = {};
  for (int64_t r = 0; r < rows && r < kLanes; ++r)
    for (int64_t e = 0; e < size; e += kLanes)
      parts[r] += load(a + r * stride + e, size - e) * load(b + r * stride + e, size - e);
  return lane_sums(parts);
}

// Keys key_begin:key_end, at most key_chunk(size): their gradients, and what they add to the queries' gradients.
template <typename T, typename Q>
void attention_backward(const Head<T>& head, int64_t key_begin, int64_t key_end, const Ahead& next, const T* grad_out, const T* out,
                        const float* lse, const float* grad_lse, Q* grad_q, int64_t grad_q_stride, T* grad_k, T* grad_v,
                        float* buffer) {
  const int64_t columns = padded_size(head.size), padded = row_stride(head.size), chunk = key_end - key_begin;
  float* const keys = buffer;
  float* const values = keys + chunk * padded;
  float* const key_grads = values + chunk * padded;
  float* const value_grads = key_grads + chunk * padded;
  float* const q = value_grads + chunk * padded;
  float* const q_transposed = q + kQueryBlock * padded;
  float* const grad = q_transposed + kQueryBlock * padded;
  float* const grad_transposed = grad + kQueryBlock * padded;
  float* const query_grads = grad_transposed + kQueryBlock * padded;
  float* const scores = query_grads + kQueryBlock * padded;
  float* const score_grads = scores + kKeyBlock * kQueryBlock;
  float* const block_lse = score_grads + kKeyBlock * kQueryBlock;
  float* const delta = block_lse + kQueryBlock;
  pack(chunk, head.size, head.k + key_begin * head.k_stride, head.k_stride, keys, padded);
  pack(chunk, head.size, head.v + key_begin * head.v_stride, head.v_stride, values, padded);
  std::memset(key_grads, 0, 2 * chunk * padded * sizeof(float));
  const Blocks blocks(head.queries, kQueryBlock, kQueryUnit);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t query = blocks.begin(b), queries = blocks.end(b) - query, width = blocks.width(b);
    const int64_t seen = visible_keys(query + queries - 1, head.offset, key_end) - key_begin;
    if (seen <= 0) {
      std::memset(query_grads, 0, queries * padded * sizeof(float));
      unpack(queries, head.size, query_grads, padded, 1, grad_q + query * grad_q_stride, grad_q_stride);
      continue;
    }
    const T* const block_q = head.q + query * head.q_stride;
    const T* const block_grad = grad_out + query * head.out_stride;
    pack(queries, head.size, block_q, head.q_stride, q, padded);
    pack(queries, head.size, block_grad, head.out_stride, grad, padded);
    pack_transposed(queries, head.size, block_q, head.q_stride, head.scale, q_transposed, width);
    pack_transposed(queries, head.size, block_grad, head.out_stride, 1.0f, grad_transposed, width);
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t at = query + i, rows = queries - i;
      const Vec found = load(lse + at, rows > 0 ? rows : 0);
      store(block_lse + i, found == -INFINITY ? Vec{} : found);
      Vec d = dots(rows, head.size, block_grad + i * head.out_stride, out + at * head.out_stride, head.out_stride);
      if (grad_lse != nullptr) d -= load(grad_lse + at, rows > 0 ? rows : 0);
      store(delta + i, d);
    }
    Ahead ahead = next;
    if (b + 1 < blocks.count) {
      const int64_t query_after = blocks.end(b), queries_after = blocks.end(b + 1) - query_after;
      ahead = {};
      ahead.add(queries_after, head.size, head.q + query_after * head.q_stride, head.q_stride);
      ahead.add(queries_after, head.size, grad_out + query_after * head.out_stride, head.out_stride);
      ahead.add(queries_after, head.size, out + query_after * head.out_stride, head.out_stride);
    }
    const Blocks key_blocks(seen, kKeyBlock, 1);
    for (int64_t kb = 0; kb < key_blocks.count; ++kb) {
      const int64_t key = key_blocks.begin(kb), count = key_blocks.end(kb) - key;
      const ScoreBlock block{key_begin + key, count, query, width, head.offset};
      multiply<false>(count, width, head.size, keys + key * padded, padded, q_transposed, width, scores, width, ahead,
                      false);
      multiply<false>(count, width, head.size, values + key * padded, padded, grad_transposed, width, score_grads,
                      width, ahead, false);
      hide(block, scores);
      softmax_backward(block, scores, score_grads, block_lse, delta);
      multiply<false>(count, columns, queries, scores, width, grad, padded, value_grads + key * padded, padded, ahead,
                      true);
      multiply<false>(count, columns, queries, score_grads, width, q, padded, key_grads + key * padded, padded, ahead,
                      true);
      multiply<true>(queries, columns, count, score_grads, width, keys + key * padded, padded, query_grads, padded,
                     ahead, kb > 0);
    }
    unpack(queries, head.size, query_grads, padded, head.scale, grad_q + query * grad_q_stride, grad_q_stride);
  }
  unpack(chunk, head.size, key_grads, padded, head.scale, grad_k + key_begin * head.out_stride, head.out_stride);
  unpack(chunk, head.size, value_grads, padded, 1, grad_v + key_begin * head.out_stride, head.out_stride);
}

// The sum of `parts` arrays [rows, size], in their order.
template <typename T>
void add_parts(int64_t parts, int64_t rows, int64_t size, const float* from, int64_t part_stride, T* to,
               int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < size; e += kLanes) {
      Vec total{};
      for (int64_t p = 0; p < parts; ++p) total += load(from + p * part_stride + r * size + e, size - e);
      store(to + r * stride + e, total, size - e);
    }
}

// Rows of few queries, all heads at once: keys and values are read where they lie, and lanes are keys.

// The dot products of one packed row with `rows` others, at most kLanes.
template <typename T>
Vec dots_with(const float* x, int64_t rows, int64_t size, const T* from, int64_t stride) {
  Vec parts[kLanes] = {};
  for (int64_t e = 0; e < size; e += kLanes) {
    const Vec part = load(x + e);
    if (rows >= kLanes && size - e >= kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) parts[i] += part * load(from + i * stride + e);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < rows) parts[i] += part * load(from + i * stride + e, size - e);
    }
  }
  return lane_sums(parts);
}

// How many of `left` keys are taken together.
inline int64_t group(int64_t left) {
  return left < kLanes ? left : kLanes;
}

// Where query `query` sees the keys from `key` of which there are `keys`.
inline IntVec seen_by(int64_t query, int64_t key, int64_t keys, int64_t offset) {
  return lane_numbers() < (int32_t)(visible_keys(query, offset, keys) - key);
}

inline int64_t few_buffer(int64_t heads, int64_t size, int64_t keys) {
  return kFewQueries * heads * (4 * padded_size(size) + padded_size(keys) + 2 * kLanes);
}

// All heads of a row of N queries; `head` is the first, and `next` tells where the others are.
template <int N, typename T>
void few_attention(const Head<T>& head, const HeadStrides& next, T* out, float* lse, float* buffer) {
  const int64_t padded = padded_size(head.size), row = padded_size(head.keys), size = head.size;
  float* const q = buffer;
  float* const sums = q + next.heads * N * padded;
  float* const scores = sums + next.heads * N * padded;
  for (int64_t h = 0; h < next.heads; ++h) pack(N, size, head.q + h * next.q, head.q_stride, q + h * N * padded, padded);
  for (int64_t i = 0; i < next.heads * N * padded; i += kLanes) {
    store(q + i, head.scale * load(q + i));
    store(sums + i, Vec{});
  }
  for (int64_t key = 0; key < head.keys; key += kLanes)
    for (int64_t h = 0; h < next.heads; ++h) {
      const T* const k = head.k + h * next.k + key * head.k_stride;
      prefetch(group(head.keys - key - kLanes), size, k + kLanes * head.k_stride, head.k_stride);
      if (key < kLanes) prefetch(group(head.keys), size, head.v + h * next.v, head.v_stride);
      for (int64_t n = 0; n < N; ++n) {
        const Vec score = dots_with(q + (h * N + n) * padded, head.keys - key, size, k, head.k_stride);
        store(scores + (h * N + n) * row + key,
              seen_by(n, key, head.keys, head.offset) ? score : splat(-INFINITY));
      }
    }
  for (int64_t h = 0; h < next.heads; ++h)
    for (int64_t n = 0; n < N; ++n) {
      float* const x = scores + (h * N + n) * row;
      Vec top = splat(-INFINITY), total{};
      for (int64_t key = 0; key < row; key += kLanes) top = greater(load(x + key), top);
      const float most = greatest(top);
      const Vec base = splat(most == -INFINITY ? 0 : most);
      for (int64_t key = 0; key < row; key += kLanes) {
        const Vec p = power_of_two((load(x + key) - base) * kLog2E);
        store(x + key, p);
        total += p;
      }
      const float all = sum(total);
      const Vec inverse = splat(all == 0 ? 0 : 1 / all);
      for (int64_t key = 0; key < row; key += kLanes) store(x + key, inverse * load(x + key));
      lse[h * next.lse + n] = all == 0 ? -INFINITY : most + std::log(all);
    }
  for (int64_t key = 0; key < head.keys; key += kLanes) {
    const int64_t count = group(head.keys - key);
    for (int64_t h = 0; h < next.heads; ++h) {
      prefetch(group(head.keys - key - kLanes), size, head.v + h * next.v + (key + kLanes) * head.v_stride,
               head.v_stride);
      for (int64_t e = 0; e < size; e += kLanes) {
        const T* const v = head.v + h * next.v + key * head.v_stride + e;
        const float* const p = scores + h * N * row + key;
        float* const to = sums + h * N * padded + e;
        // Two sums, so that one multiplication need not wait for the one before.
        Vec even[N] = {}, odd[N] = {};
        int64_t i = 0;
        for (; i + 1 < count; i += 2) {
          const Vec value = load(v + i * head.v_stride, size - e), after = load(v + (i + 1) * head.v_stride, size - e);
          for (int n = 0; n < N; ++n) {
            even[n] += p[n * row + i] * value;
            odd[n] += p[n * row + i + 1] * after;
          }
        }
        for (int n = 0; n < N; ++n) {
          if (i < count) even[n] += p[n * row + i] * load(v + i * head.v_stride, size - e);
          store(to + n * padded, load(to + n * padded) + even[n] + odd[n]);
        }
      }
    }
  }
  for (int64_t h = 0; h < next.heads; ++h)
    unpack(N, size, sums + h * N * padded, padded, 1, out + h * size, head.out_stride);
}

template <int N, typename T>
void few_attention_backward(const Head<T>& head, const HeadStrides& next, const T* grad_out, const T* out,
                            const float* lse, const float* grad_lse, T* grad_q, T* grad_k, T* grad_v, float* buffer) {
  const int64_t padded = padded_size(head.size), size = head.size, block = N * padded;
  float* const q = buffer;
  float* const grad = q + next.heads * block;
  float* const query_grads = grad + next.heads * block;
  float* const delta = query_grads + next.heads * block;
  for (int64_t h = 0; h < next.heads; ++h) {
    pack(N, size, head.q + h * next.q, head.q_stride, q + h * block, padded);
    pack(N, size, grad_out + h * size, head.out_stride, grad + h * block, padded);
    Vec d = dots(N, size, grad_out + h * size, out + h * size, head.out_stride);
    if (grad_lse != nullptr) d -= load(grad_lse + h * next.lse, N);
    store(delta + h * kLanes, d);
  }
  for (int64_t i = 0; i < next.heads * block; i += kLanes) {
    store(q + i, head.scale * load(q + i));
    store(query_grads + i, Vec{});
  }
  for (int64_t key = 0; key < head.keys; key += kLanes) {
    const int64_t count = group(head.keys - key), after = group(head.keys - key - kLanes);
    for (int64_t h = 0; h < next.heads; ++h) {
      const T* const k = head.k + h * next.k + key * head.k_stride;
      const T* const v = head.v + h * next.v + key * head.v_stride;
      const int64_t at = key * head.out_stride + h * size, at_after = at + kLanes * head.out_stride;
      prefetch(after, size, k + kLanes * head.k_stride, head.k_stride);
      prefetch(after, size, v + kLanes * head.v_stride, head.v_stride);
      prefetch(after, size, grad_k + at_after, head.out_stride);
      prefetch(after, size, grad_v + at_after, head.out_stride);
      float p[N][kLanes], ds[N][kLanes];
      for (int n = 0; n < N; ++n) {
        const float query_lse = lse[h * next.lse + n];
        const Vec score = dots_with(q + h * block + n * padded, count, size, k, head.k_stride);
        const Vec grads = dots_with(grad + h * block + n * padded, count, size, v, head.v_stride);
        Vec probability = power_of_two((score - (query_lse == -INFINITY ? 0 : query_lse)) * kLog2E);
        probability = seen_by(n, key, head.keys, head.offset) ? probability : Vec{};
        store(p[n], probability);
        store(ds[n], probability * (grads - delta[h * kLanes + n]));
      }
      for (int64_t e = 0; e < size; e += kLanes) {
        Vec total[N] = {}, from_q[N], from_grad[N];
        for (int n = 0; n < N; ++n) {
          from_q[n] = load(q + h * block + n * padded + e);
          from_grad[n] = load(grad + h * block + n * padded + e);
        }
        for (int64_t i = 0; i < count; ++i) {
          const Vec key_part = load(k + i * head.k_stride + e, size - e);
          Vec key_grad{}, value_grad{};
          for (int n = 0; n < N; ++n) {
            total[n] += ds[n][i] * key_part;
            key_grad += ds[n][i] * from_q[n];
            value_grad += p[n][i] * from_grad[n];
          }
          store(grad_k + at + i * head.out_stride + e, key_grad, size - e);
          store(grad_v + at + i * head.out_stride + e, value_grad, size - e);
        }
        for (int n = 0; n < N; ++n) {
          float* const to = query_grads + h * block + n * padded + e;
          store(to, load(to) + total[n]);
        }
      }
    }
  }
  for (int64_t h = 0; h < next.heads; ++h)
    unpack(N, size, query_grads + h * block, padded, head.scale, grad_q + h * size, head.out_stride);
}

// Calls the one of these for as many queries as the row has, 1 to kFewQueries.
template <int N = kFewQueries, typename T, typename... Arguments>
void few(const Head<T>& head, const Arguments&... arguments) {
  if (head.queries == N) return few_attention<N>(head, arguments...);
  if constexpr (N > 1) few<N - 1>(head, arguments...);
}

template <int N = kFewQueries, typename T, typename... Arguments>
void few_backward(const Head<T>& head, const Arguments&... arguments) {
  if (head.queries == N) return few_attention_backward<N>(head, arguments...);
  if constexpr (N > 1) few_backward<N - 1>(head, arguments...);
}
