// packed_attention in bfloat16 on the tile unit (AMX), included inside the namespace of AVX-512.
//
// Blocks are those of packed_attention.inl, and scores are held transposed as there. A tile is 16 rows of 64 bytes. A
// product of tiles takes rows of bfloat16 as its first factor, and as its second *pairs*: elements 2i and 2i + 1 of a
// column side by side, one word. Sums, maxima and exponentials stay in float32; probabilities and the gradients of
// scores are rounded before they are multiplied, as PyTorch does.

constexpr int64_t kTile = 16;       // rows of a tile, and words of one
constexpr int64_t kTileDepth = 32;  // elements of bfloat16 that a row of a tile holds

typedef uint32_t Pair;
typedef uint32_t UnalignedPairs __attribute__((vector_size(64), aligned(4), may_alias));

inline int64_t round_up(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// While one lives, its thread's eight tiles have their full size.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("" ::"m"(shape));
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// c = a b, or c + a b if `add`, for R by C tiles: a is [16 R, depth], b [depth / 2, 16 C] pairs.
template <int R, int C>
__attribute__((noinline)) void multiply_tiles(int64_t depth, const BFloat16* a, int64_t lda, const Pair* b, int64_t ldb,
                                              float* c, int64_t ldc, bool add) {
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
  float* const c_below = c + kTile * ldc;
  // The compiler does not know what the instructions read and write.
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C > 1) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (R > 1) _tile_loadd(2, c_below, c_bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, c_below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const Pair* const b_rows = b + k / 2 * ldb;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b_rows, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b_rows + kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a + kTile * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (R > 1) _tile_stored(2, c_below, c_bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, c_below + kTile, c_bytes);
  asm volatile("" ::: "memory");
}

template <int R>
void multiply_tile_rows(int64_t columns, int64_t depth, const BFloat16* a, int64_t lda, const Pair* b, int64_t ldb,
                        float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kTile < columns; j += 2 * kTile) multiply_tiles<R, 2>(depth, a, lda, b + j, ldb, c + j, ldc, add);
  if (j < columns) multiply_tiles<R, 1>(depth, a, lda, b + j, ldb, c + j, ldc, add);
}

// The same for any number of rows and columns, both computed in whole tiles, and a depth in whole tiles.
inline void multiply_in_tiles(int64_t rows, int64_t columns, int64_t depth, const BFloat16* a, int64_t lda,
                              const Pair* b, int64_t ldb, float* c, int64_t ldc, bool add, Ahead& ahead) {
  for (int64_t r = 0; r < rows; r += 2 * kTile) {
    ahead.step();
    if (r + kTile < rows)
      multiply_tile_rows<2>(columns, depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
    else
      multiply_tile_rows<1>(columns, depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
  }
}

// Copies rows to rows `padded` apart; these, and the rows up to whole tiles, are filled up with 0.
inline void pack_rows(int64_t rows, int64_t size, const BFloat16* from, int64_t stride, BFloat16* to, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(static_cast<void*>(to + r * padded), from + r * stride, size * sizeof(BFloat16));
    std::memset(static_cast<void*>(to + r * padded + size), 0, (padded - size) * sizeof(BFloat16));
  }
  std::memset(static_cast<void*>(to + rows * padded), 0, (round_up(rows, kTile) - rows) * padded * sizeof(BFloat16));
}

// Transposed, to [padded, width]: 0 where there is no row.
inline void pack_transposed_rows(int64_t rows, int64_t size, const BFloat16* from, int64_t stride, BFloat16* to,
                                 int64_t padded, int64_t width, int64_t to_stride) {
  for (int64_t e = 0; e < padded; e += kLanes)
    for (int64_t r = 0; r < width; r += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows && e < size ? load(from + (r + i) * stride + e, size - e) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const HalfBitVec bits = __builtin_convertvector((BitVec)block[i] >> 16, HalfBitVec);
        *reinterpret_cast<UnalignedHalfBitVec*>(to + (e + i) * to_stride + r) = bits;
      }
    }
}

// The first `count` elements, the others 0, as words of two.
inline Vec load_pairs(const BFloat16* p, int64_t count) {
  const auto mask = count >= kTileDepth ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
  return (Vec)_mm512_maskz_loadu_epi16(mask, p);
}

// Pairs of neighbours in a row, transposed, to [padded / 2, width]: 0 where there is no row.
inline void pack_pairs_across(int64_t rows, int64_t size, const BFloat16* from, int64_t stride, Pair* to,
                              int64_t padded, int64_t width) {
  for (int64_t e = 0; e < padded; e += kTileDepth)
    for (int64_t r = 0; r < width; r += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? load_pairs(from + (r + i) * stride + e, size - e) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        *reinterpret_cast<UnalignedPairs*>(to + (e / 2 + i) * width + r) = (UnalignedPairs)block[i];
    }
}

// Two vectors of bfloat16, one after the other, as pairs.
inline UnalignedPairs interleave(__m512i both) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr Words kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (UnalignedPairs)_mm512_permutexvar_epi16((__m512i)kOrder, both);
}

// Pairs of neighbours in a column, to [width / 2, padded]: 0 where there is no row.
inline void pack_pairs_down(int64_t rows, int64_t size, const BFloat16* from, int64_t stride, Pair* to, int64_t padded,
                            int64_t width) {
  const auto part = [&](int64_t r, int64_t e) {
    const int64_t count = r < rows ? size - e : 0;
    const auto mask = count >= kLanes ? static_cast<__mmask16>(~0u)
                                      : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
    return _mm256_maskz_loadu_epi16(mask, from + r * stride + e);
  };
  for (int64_t r = 0; r < width; r += 2)
    for (int64_t e = 0; e < padded; e += kLanes) {
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(part(r, e)), part(r + 1, e), 1);
      *reinterpret_cast<UnalignedPairs*>(to + r / 2 * padded + e) = interleave(both);
    }
}

inline UnalignedPairs round_pairs(Vec even, Vec odd) {
  return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

inline void round_to(BFloat16* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// From [size, width], each column times its factor, to rows.
template <typename T>
void unpack_transposed(int64_t rows, int64_t size, const float* from, int64_t width, const float* factor, T* to,
                       int64_t stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t e = 0; e < size; e += kLanes) {
      const Vec by = load(factor + r);
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = by * load(from + (e + i) * width + r);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (r + i < rows) store(to + (r + i) * stride + e, block[i], size - e);
    }
}

// 2 to the power x; 0 below the least normal result. Relative error at most 4e-6 for x <= 127; NaN stays NaN.
inline Vec near_power_of_two(Vec x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec n = (x + shift) - shift, r = x - n;
  Vec p = splat(9.58285e-3f);
  p = p * r + 5.590643e-2f;
  p = p * r + 2.4024099e-1f;
  p = p * r + 6.9312419e-1f;
  p = p * r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}

// Scores to the base 2, minus infinity where the mask hides them; Masked says whether it may hide some. Passed by value,
// so that the compiler keeps it in registers.
template <bool Masked>
struct Exponents {
  ScoreBlock block;
  const float* scores;
  float scale;

  __m512 at(int64_t k, int64_t j) const {
    const Vec x = scale * load(scores + k * block.width + j);
    if (!Masked || k + block.key <= block.query + block.offset) return (__m512)x;
    return (__m512)(block.visible(k, j) ? x : splat(-INFINITY));
  }
};

// Calls run(Exponents<Masked>).
template <typename F>
auto with_exponents(const ScoreBlock& block, const float* scores, float scale, const F& run) {
  if (block.key + block.keys - 1 <= block.query + block.offset)
    return run(Exponents<false>{block, scores, scale * kLog2E});
  return run(Exponents<true>{block, scores, scale * kLog2E});
}

// As in packed_attention.inl, with maxima to the base 2; exponentials go, rounded, to `pairs` [depth / 2, width], 0 past
// the last key. Returns whether some factor is not 1.
template <bool Masked>
bool online_softmax(const Exponents<Masked> exponents, float* most, float* total, float* factor, Pair* pairs,
                    int64_t depth) {
  const int64_t keys = exponents.block.keys, width = exponents.block.width;
  bool changed = false;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec before = load(most + j);
    __m512 greatest[4] = {(__m512)before, (__m512)before, (__m512)before, (__m512)before};
    int64_t k = 0;
    for (; k + 3 < keys; k += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) greatest[i] = _mm512_max_ps(exponents.at(k + i, j), greatest[i]);
    for (; k < keys; ++k) greatest[0] = _mm512_max_ps(exponents.at(k, j), greatest[0]);
    const Vec now = (Vec)_mm512_max_ps(_mm512_max_ps(greatest[0], greatest[1]),
                                       _mm512_max_ps(greatest[2], greatest[3]));
    const Vec base = now == -INFINITY ? Vec{} : now;
    Vec even{}, odd{};
    Pair* to = pairs + j;
    for (k = 0; k + 1 < keys; k += 2, to += width) {
      const Vec p = near_power_of_two((Vec)exponents.at(k, j) - base);
      const Vec after = near_power_of_two((Vec)exponents.at(k + 1, j) - base);
      *reinterpret_cast<UnalignedPairs*>(to) = round_pairs(p, after);
      even += p;
      odd += after;
    }
    if (k < keys) {
      const Vec p = near_power_of_two((Vec)exponents.at(k, j) - base);
      *reinterpret_cast<UnalignedPairs*>(to) = round_pairs(p, Vec{});
      even += p;
      k += 2, to += width;
    }
    for (; k < depth; k += 2, to += width) *reinterpret_cast<UnalignedPairs*>(to) = UnalignedPairs{};
    const Vec shrink = near_power_of_two(before - base);
    changed |= _mm512_cmp_ps_mask((__m512)shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0;
    store(most + j, now);
    store(factor + j, shrink);
    store(total + j, load(total + j) * shrink + even + odd);
  }
  return changed;
}

// Hands out parts of a buffer, each from a cache line on.
class Parts {
 public:
  explicit Parts(float* buffer) : at_(reinterpret_cast<char*>(buffer)) {}

  template <typename T>
  T* take(int64_t count) {
    char* const part = at_;
    at_ += round_up(count * int64_t{sizeof(T)}, 64);
    return reinterpret_cast<T*>(part);
  }

  int64_t taken(const float* buffer) const { return (at_ - reinterpret_cast<const char*>(buffer)) / 4; }

 private:
  char* at_;
};

// What one item of the forward holds; `padded` is the head's size in whole tiles.
struct ForwardParts {
  Pair *q, *probabilities;
  BFloat16 *keys, *values;
  float *sums, *scores, *most, *total, *factor;
  int64_t size;

  ForwardParts(float* buffer, int64_t padded) {
    Parts parts(buffer);
    q = parts.take<Pair>(kQueryChunk * padded / 2);
    probabilities = parts.take<Pair>(kKeyBlock / 2 * kQueryBlock);
    keys = parts.take<BFloat16>(kKeyBlock * padded);
    values = parts.take<BFloat16>(kKeyBlock * padded);
    sums = parts.take<float>(kQueryChunk * padded);
    scores = parts.take<float>(kKeyBlock * kQueryBlock);
    most = parts.take<float>(kQueryChunk);
    total = parts.take<float>(kQueryChunk);
    factor = parts.take<float>(kQueryChunk);
    size = parts.taken(buffer);
  }
};

inline int64_t forward_buffer(int64_t size) {
  return ForwardParts(nullptr, round_up(size, kTileDepth)).size;
}

inline void attention(const Head<BFloat16>& head, int64_t query_begin, int64_t query_end, const Ahead& next,
                      BFloat16* out, float* lse, float* buffer) {
  const Tiles tiles;
  const int64_t padded = round_up(head.size, kTileDepth), queries = query_end - query_begin;
  const ForwardParts parts(buffer, padded);
  const Blocks blocks(queries, kQueryBlock, kQueryUnit);
  for (int64_t i = 0; i < kQueryChunk; ++i) parts.most[i] = -INFINITY, parts.total[i] = 0;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = blocks.begin(b);
    pack_pairs_across(blocks.end(b) - begin, head.size, head.q + (query_begin + begin) * head.q_stride, head.q_stride,
                      parts.q + begin * padded / 2, padded, blocks.width(b));
  }
  const Blocks key_blocks(visible_keys(query_end - 1, head.offset, head.keys), kKeyBlock, kTileDepth);
  if (key_blocks.count == 0) std::memset(parts.sums, 0, kQueryChunk * padded * sizeof(float));
  for (int64_t kb = 0; kb < key_blocks.count; ++kb) {
    const int64_t key = key_blocks.begin(kb), count = key_blocks.end(kb) - key, depth = round_up(count, kTileDepth);
    pack_rows(count, head.size, head.k + key * head.k_stride, head.k_stride, parts.keys, padded);
    pack_transposed_rows(count, head.size, head.v + key * head.v_stride, head.v_stride, parts.values, padded, depth,
                         kKeyBlock);
    Ahead ahead = next;
    if (kb + 1 < key_blocks.count) {
      const int64_t key_after = key_blocks.end(kb), count_after = key_blocks.end(kb + 1) - key_after;
      ahead = {};
      ahead.add(count_after, head.size, head.k + key_after * head.k_stride, head.k_stride);
      ahead.add(count_after, head.size, head.v + key_after * head.v_stride, head.v_stride);
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t begin = blocks.begin(b), end = blocks.end(b), width = blocks.width(b);
      float* const sums = parts.sums + begin * padded;
      const int64_t block_keys = visible_keys(query_begin + end - 1, head.offset, key + count) - key;
      if (block_keys <= 0) {
        if (kb == 0) std::memset(sums, 0, width * padded * sizeof(float));
        continue;
      }
      const ScoreBlock block{key, block_keys, query_begin + begin, width, head.offset};
      multiply_in_tiles(block_keys, width, padded, parts.keys, padded, parts.q + begin * padded / 2, width,
                        parts.scores, width, false, ahead);
      const bool changed = with_exponents(block, parts.scores, head.scale, [&](const auto exponents) {
        return online_softmax(exponents, parts.most + begin, parts.total + begin, parts.factor + begin,
                              parts.probabilities, depth);
      });
      if (kb > 0 && changed)
        for (int64_t e = 0; e < padded; ++e)
          for (int64_t j = 0; j < width; j += kLanes)
            store(sums + e * width + j, load(parts.factor + begin + j) * load(sums + e * width + j));
      multiply_in_tiles(padded, width, depth, parts.values, kKeyBlock, parts.probabilities, width, sums, width, kb > 0,
                        ahead);
    }
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = blocks.begin(b), end = blocks.end(b), width = blocks.width(b);
    for (int64_t i = begin; i < end; ++i) {
      const bool none = parts.total[i] == 0;
      parts.factor[i] = none ? 0 : 1 / parts.total[i];
      lse[query_begin + i] = none ? -INFINITY : parts.most[i] / kLog2E + std::log(parts.total[i]);
    }
    unpack_transposed(end - begin, head.size, parts.sums + begin * padded, width, parts.factor + begin,
                      out + (query_begin + begin) * head.out_stride, head.out_stride);
  }
}

// Probabilities and the gradients of the unscaled scores: both rounded, in rows, and the latter in pairs too.
struct RoundedGradients {
  BFloat16 *probabilities, *rows;
  Pair* pairs;
};

// From `grads`, the gradients of the probabilities; 0 past the last key.
template <bool Masked>
void softmax_backward(const Exponents<Masked> exponents, const float* grads, const float* lse, const float* delta,
                      const RoundedGradients rounded, int64_t depth) {
  const int64_t keys = exponents.block.keys, width = exponents.block.width;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec query_lse = load(lse + j), query_delta = load(delta + j);
    const auto row = [&](int64_t k) {
      Vec p{}, grad{};
      if (k < keys) {
        p = near_power_of_two((Vec)exponents.at(k, j) - query_lse);
        grad = p * (load(grads + k * width + j) - query_delta);
      }
      round_to(rounded.probabilities + k * width + j, p);
      round_to(rounded.rows + k * width + j, grad);
      return grad;
    };
    for (int64_t k = 0; k < depth; k += 2) {
      const Vec even = row(k), odd = row(k + 1);
      *reinterpret_cast<UnalignedPairs*>(rounded.pairs + k / 2 * width + j) = round_pairs(even, odd);
    }
  }
}

// What one item of the backward holds, `chunk` keys in whole tiles.
struct BackwardParts {
  BFloat16 *keys, *values, *keys_across;
  float *key_grads, *value_grads, *query_grads, *scores, *score_grads, *lse, *delta, *factor;
  Pair *q_across, *grad_across, *q_down, *grad_down;
  RoundedGradients rounded;
  int64_t size;

  BackwardParts(float* buffer, int64_t padded, int64_t chunk) {
    Parts parts(buffer);
    keys = parts.take<BFloat16>(chunk * padded);
    values = parts.take<BFloat16>(chunk * padded);
    keys_across = parts.take<BFloat16>(chunk * padded);
    key_grads = parts.take<float>(chunk * padded);
    value_grads = parts.take<float>(chunk * padded);
    query_grads = parts.take<float>(kQueryBlock * padded);
    scores = parts.take<float>(kKeyBlock * kQueryBlock);
    score_grads = parts.take<float>(kKeyBlock * kQueryBlock);
    lse = parts.take<float>(kQueryBlock);
    delta = parts.take<float>(kQueryBlock);
    factor = parts.take<float>(kQueryBlock);
    q_across = parts.take<Pair>(kQueryBlock * padded / 2);
    grad_across = parts.take<Pair>(kQueryBlock * padded / 2);
    q_down = parts.take<Pair>(kQueryBlock * padded / 2);
    grad_down = parts.take<Pair>(kQueryBlock * padded / 2);
    rounded.probabilities = parts.take<BFloat16>(kKeyBlock * kQueryBlock);
    rounded.rows = parts.take<BFloat16>(kKeyBlock * kQueryBlock);
    rounded.pairs = parts.take<Pair>(kKeyBlock / 2 * kQueryBlock);
    size = parts.taken(buffer);
  }
};

inline int64_t backward_buffer(int64_t size) {
  return BackwardParts(nullptr, round_up(size, kTileDepth), round_up(key_chunk(size), kTileDepth)).size;
}

template <typename Q>
void attention_backward(const Head<BFloat16>& head, int64_t key_begin, int64_t key_end, const Ahead& next,
                        const BFloat16* grad_out, const BFloat16* out, const float* lse, const float* grad_lse,
                        Q* grad_q, int64_t grad_q_stride, BFloat16* grad_k, BFloat16* grad_v, float* buffer) {
  const Tiles tiles;
  const int64_t padded = round_up(head.size, kTileDepth), chunk = key_end - key_begin;
  const int64_t across = round_up(chunk, kTileDepth);
  const BackwardParts parts(buffer, padded, across);
  const BFloat16 *const k = head.k + key_begin * head.k_stride, *const v = head.v + key_begin * head.v_stride;
  pack_rows(chunk, head.size, k, head.k_stride, parts.keys, padded);
  pack_rows(chunk, head.size, v, head.v_stride, parts.values, padded);
  pack_transposed_rows(chunk, head.size, k, head.k_stride, parts.keys_across, padded, across, across);
  std::memset(parts.key_grads, 0, across * padded * sizeof(float));
  std::memset(parts.value_grads, 0, across * padded * sizeof(float));
  for (int64_t i = 0; i < kQueryBlock; ++i) parts.factor[i] = head.scale;
  // Queries are the depth of two products.
  const Blocks blocks(head.queries, kQueryBlock, kTileDepth);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t query = blocks.begin(b), queries = blocks.end(b) - query, width = blocks.width(b);
    Q* const block_grad_q = grad_q + query * grad_q_stride;
    const int64_t seen = visible_keys(query + queries - 1, head.offset, key_end) - key_begin;
    if (seen <= 0) {
      std::memset(parts.query_grads, 0, width * padded * sizeof(float));
      unpack_transposed(queries, head.size, parts.query_grads, width, parts.factor, block_grad_q, grad_q_stride);
      continue;
    }
    const BFloat16* const q = head.q + query * head.q_stride;
    const BFloat16* const grad = grad_out + query * head.out_stride;
    pack_pairs_across(queries, head.size, q, head.q_stride, parts.q_across, padded, width);
    pack_pairs_across(queries, head.size, grad, head.out_stride, parts.grad_across, padded, width);
    pack_pairs_down(queries, head.size, q, head.q_stride, parts.q_down, padded, width);
    pack_pairs_down(queries, head.size, grad, head.out_stride, parts.grad_down, padded, width);
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t at = query + i, rows = queries - i;
      const Vec found = load(lse + at, rows > 0 ? rows : 0);
      store(parts.lse + i, found == -INFINITY ? Vec{} : found * kLog2E);
      Vec d = dots(rows, head.size, grad + i * head.out_stride, out + at * head.out_stride, head.out_stride);
      if (grad_lse != nullptr) d -= load(grad_lse + at, rows > 0 ? rows : 0);
      store(parts.delta + i, d);
    }
    Ahead ahead = next;
    if (b + 1 < blocks.count) {
      const int64_t query_after = blocks.end(b), queries_after = blocks.end(b + 1) - query_after;
      ahead = {};
      ahead.add(queries_after, head.size, head.q + query_after * head.q_stride, head.q_stride);
      ahead.add(queries_after, head.size, grad_out + query_after * head.out_stride, head.out_stride);
      ahead.add(queries_after, head.size, out + query_after * head.out_stride, head.out_stride);
    }
    const Blocks key_blocks(seen, kKeyBlock, kTileDepth);
    for (int64_t kb = 0; kb < key_blocks.count; ++kb) {
      const int64_t key = key_blocks.begin(kb), count = key_blocks.end(kb) - key, depth = round_up(count, kTileDepth);
      const ScoreBlock block{key_begin + key, count, query, width, head.offset};
      multiply_in_tiles(count, width, padded, parts.keys + key * padded, padded, parts.q_across, width, parts.scores,
                        width, false, ahead);
      multiply_in_tiles(count, width, padded, parts.values + key * padded, padded, parts.grad_across, width,
                        parts.score_grads, width, false, ahead);
      with_exponents(block, parts.scores, head.scale, [&](const auto exponents) {
        softmax_backward(exponents, parts.score_grads, parts.lse, parts.delta, parts.rounded, depth);
      });
      multiply_in_tiles(count, padded, width, parts.rounded.probabilities, width, parts.grad_down, padded,
                        parts.value_grads + key * padded, padded, true, ahead);
      multiply_in_tiles(count, padded, width, parts.rounded.rows, width, parts.q_down, padded,
                        parts.key_grads + key * padded, padded, true, ahead);
      multiply_in_tiles(padded, width, depth, parts.keys_across + key, across, parts.rounded.pairs, width,
                        parts.query_grads, width, kb > 0, ahead);
    }
    unpack_transposed(queries, head.size, parts.query_grads, width, parts.factor, block_grad_q, grad_q_stride);
  }
  unpack(chunk, head.size, parts.key_grads, padded, head.scale, grad_k + key_begin * head.out_stride, head.out_stride);
  unpack(chunk, head.size, parts.value_grads, padded, 1, grad_v + key_begin * head.out_stride, head.out_stride);
}
