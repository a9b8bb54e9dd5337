// How packed_attention is cut into blocks, the same for every instruction set.

#pragma once

#include <cstdint>

namespace cmaclip {

constexpr int64_t kQueryUnit = 16;    // a block's width is a multiple: at least one vector
constexpr int64_t kQueryBlock = 64;   // queries whose scores are computed together
constexpr int64_t kQueryChunk = 256;  // queries of one item of the forward: keys are packed once for all of them
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kFewQueries = 4;  // rows of at most so many are computed without packing their keys
constexpr int64_t kFewScores = 65536;
constexpr int64_t kUnmasked = int64_t{1} << 30;

// Keys of one item of the backward: as many as leave it and its gradients in the second-level cache.
inline int64_t key_chunk(int64_t size) {
  const int64_t fitting = 32768 / ((size + 15) / 16 * 16) / kKeyBlock * kKeyBlock;
  return fitting < kKeyBlock ? kKeyBlock : fitting > 512 ? 512 : fitting;
}

// `size` elements in as few blocks of at most `most` as there can be, of nearly equal size, beginning at multiples of
// `unit`.
struct Blocks {
  int64_t size, unit, count, units;

  Blocks(int64_t size, int64_t most, int64_t unit)
      : size(size), unit(unit), count((size + most - 1) / most), units((size + unit - 1) / unit) {}

  int64_t begin(int64_t block) const { return units * block / count * unit; }
  int64_t end(int64_t block) const { return block + 1 == count ? size : begin(block + 1); }
  int64_t width(int64_t block) const { return begin(block + 1) - begin(block); }
};

// The keys that some query up to `last` sees, at most `keys`.
inline int64_t visible_keys(int64_t last, int64_t offset, int64_t keys) {
  const int64_t seen = last + offset + 1;
  return seen < 0 ? 0 : seen < keys ? seen : keys;
}

// Asks for rows that will be read soon.
template <typename T>
void prefetch(int64_t rows, int64_t size, const T* data, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(data + r * stride + i, 0, 2);
}

// Rows of matrices that will be read soon, fetched into the cache a few at a time while something else is computed: the
// rows of a head lie too far apart for the processor to foresee them.
class Ahead {
 public:
  template <typename T>
  void add(int64_t rows, int64_t size, const T* data, int64_t stride) {
    if (rows > 0)
      matrices_[count_++] = {reinterpret_cast<const char*>(data), rows, size * int64_t{sizeof(T)},
                             stride * int64_t{sizeof(T)}};
  }

  void step() {
    for (int rows = 0; rows < 8 && at_ < count_; ++rows) {
      Matrix& matrix = matrices_[at_];
      prefetch(1, matrix.size, matrix.data, 0);
      matrix.data += matrix.stride;
      if (--matrix.rows == 0) ++at_;
    }
  }

 private:
  struct Matrix {
    const char* data;
    int64_t rows, size, stride;
  };
  Matrix matrices_[8];
  int count_ = 0, at_ = 0;
};

// One head of one row; strides are those of tokens.
template <typename T>
struct Head {
  int64_t queries, keys, size;
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride, out_stride;
  float scale;
  int64_t offset;  // of the causal mask; `kUnmasked` without
};

// How far the heads of a row lie apart in q, k, v and the log-sum-exp.
struct HeadStrides {
  int64_t heads, q, k, v, lse;
};

}  // namespace cmaclip
