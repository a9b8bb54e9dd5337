// Tiles of matrices in shared memory, and their products on tensor cores: one code for half, bfloat16 and float.
//
// A row of a tile is cut into chunks of 16 bytes. An instruction takes two of them from each operand: 16 elements of
// 16 bits (mma m16n8k16), or 8 floats (m16n8k8 in TF32, once for each pair of their parts, see `multiply`).
// Its accumulator [16, 8] lies in a warp as sum[0..1] of lane l at row l / 4, columns 2 (l % 4) and the next, and
// sum[2..3] eight rows below (PTX ISA, "Matrix fragments for mma").
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::tile {

constexpr int kRowsPerWarp = 16;

// Columns of the left operand and rows of the right one that an instruction takes.
template <class T>
constexpr int kDepth = 2 * kPerAccess<T>;

// Where a tile's chunks lie: swizzled, so that the same chunk of eight neighbouring rows is in eight groups of banks.
template <class T, int Size>
struct Layout {
  static_assert(Size % 16 == 0, "a row is whole pairs of [_, 8] fragments");
  static constexpr int kChunks = Size / kPerAccess<T>;
  // Floats are also read down the columns, which needs rows of whole 128 bytes.
  static constexpr int kPitch = sizeof(T) == 4 ? (kChunks + 7) / 8 * 8 : kChunks;
  // Chunks of a row that fall into different groups of banks, and after how many rows the groups repeat.
  static constexpr int kGroups = kPitch % 8 == 0 ? 8 : kPitch % 4 == 0 ? 4 : 2;
  static constexpr int kPeriod = 8 / kGroups;

  __host__ __device__ static constexpr int elements(int rows) { return rows * kPitch * kPerAccess<T>; }

  // With eight groups, also pairs of chunks differ in four neighbouring rows, and in every other of eight: floats are
  // written two and two, and read down the columns.
  __device__ __forceinline__ static int swizzle(int row) {
    if constexpr (kGroups < 8) return row / kPeriod & (kGroups - 1);
    const int half = row >> 2 & 1;
    return ((row & 3) ^ half) << 1 | half;
  }

  // The first element of a chunk.
  __device__ __forceinline__ static int at(int row, int chunk) {
    return (row * kPitch + (chunk ^ swizzle(row))) * kPerAccess<T>;
  }

  __device__ __forceinline__ static int element(int row, int column) {
    return at(row, column / kPerAccess<T>) + column % kPerAccess<T>;
  }
};

// Starts the copy of `rows` rows from `first` on; rows from `end` on, and columns from `width` on, become zeros.
template <class T, int Size>
__device__ __forceinline__ void start_copy(T* tile, int rows, const T* matrix, int64_t stride, int first, int end,
                                           int width) {
  using Tile = Layout<T, Size>;
  for (int i = threadIdx.x; i < rows * Tile::kChunks; i += blockDim.x) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool valid = first + row < end && chunk * kPerAccess<T> < width;
    const T* source = matrix + (valid ? (first + row) * stride + chunk * kPerAccess<T> : 0);
    isa::cp_async_16(tile + Tile::at(row, chunk), source, valid);
  }
}

// A float as a sum of TF32's, of which each takes the next 11 bits: all of it in three.
template <int Parts>
__device__ __forceinline__ void split(uint32_t (&parts)[Parts], uint32_t bits) {
  float rest = __uint_as_float(bits);
#pragma unroll
  for (int i = 0; i < Parts; ++i) {
    parts[i] = isa::to_tf32(rest);
    rest -= __uint_as_float(parts[i]);
  }
}

// sum [16, 8] += a [16, kDepth] * b [kDepth, 8]. Of floats, `Parts` 2 keeps 22 bits of each factor, 3 all of them.
template <class T, int Parts>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t left[4][Parts], right[2][Parts];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(left[i], a[i]);
    split(right[0], b0);
    split(right[1], b1);
    // The least products first; those beyond the last part are too small to count. Tensor cores truncate, which adds up
    // over a long sum: so this slice is summed by itself, and added to the rest by an addition that rounds.
    float slice[4] = {};
#pragma unroll
    for (int both = Parts - 1; both >= 0; --both) {
#pragma unroll
      for (int of_b = 0; of_b <= both; ++of_b) {
        const int of_a = both - of_b;
        const uint32_t a_part[4] = {left[0][of_a], left[1][of_a], left[2][of_a], left[3][of_a]};
        const uint32_t b_part[2] = {right[0][of_b], right[1][of_b]};
        isa::mma_m16n8k8_tf32(slice, a_part, b_part);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += slice[i];
  } else {
    const uint32_t b[2] = {b0, b1};
    isa::mma_m16n8k16<T>(sum, a, b);
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// product [16, Columns] = rows `row`..`row + 15` of `left` times the rows of `right`; columns from `columns` on are 0.
template <class T, int Size, int Columns, int Parts>
__device__ __forceinline__ void multiply_rows(float (&product)[Columns / 8][4], const T* left, int row, const T* right,
                                              int columns) {
  using Tile = Layout<T, Size>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) product[n][i] = 0;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
    uint32_t a[4];
    isa::ldmatrix_x4(a, left + Tile::at(row + lane % 16, chunk + lane / 16));
#pragma unroll
    for (int n = 0; n < Columns / 8; n += 2) {
      if (n * 8 < columns) {
        uint32_t b[4];
        isa::ldmatrix_x4(b, right + Tile::at(n * 8 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
        multiply<T, Parts>(product[n], a, b[0], b[1]);
        if (n * 8 + 8 < columns) multiply<T, Parts>(product[n + 1], a, b[2], b[3]);
      }
    }
  }
}

// sum [16, Size] += weights [16, Columns], which are 0 from `columns` on, times the rows of `right`.
template <class T, int Size, int Columns>
__device__ __forceinline__ void add_weighted_rows(float (&sum)[Size / 8][4], const float (&weights)[Columns / 8][4],
                                                  const T* right, int columns) {
  using Tile = Layout<T, Size>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < Columns; k += kDepth<T>) {
    if (k < columns) {
      uint32_t a[4];
      const auto& first = weights[k / 8];
      if constexpr (std::is_same_v<T, float>) {
        // The instruction's columns l % 4 and l % 4 + 4 stand for 2 (l % 4) and the next: where the weights lie.
        const float parts[4] = {first[0], first[2], first[1], first[3]};
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(parts[i]);
#pragma unroll
        for (int n = 0; n < Size / 8; ++n) {
          const int above = k + 2 * (lane % 4), column = n * 8 + lane / 4;
          multiply<T, 2>(sum[n], a, __float_as_uint(right[Tile::element(above, column)]),
                      __float_as_uint(right[Tile::element(above + 1, column)]));
        }
      } else {
        const auto& second = weights[k / 8 + 1];
        a[0] = pack_pair<T>(first[0], first[1]);
        a[1] = pack_pair<T>(first[2], first[3]);
        a[2] = pack_pair<T>(second[0], second[1]);
        a[3] = pack_pair<T>(second[2], second[3]);
#pragma unroll
        for (int n = 0; n < Size / 8; n += 2) {
          uint32_t b[4];
          isa::ldmatrix_x4_trans(b, right + Tile::at(k + lane % 16, n + lane / 16));
          multiply<T, 2>(sum[n], a, b[0], b[1]);
          multiply<T, 2>(sum[n + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// Writes the warp's [16, Size] to rows from `first` to before `end` of a matrix, 16 bytes an access, by way of the
// rows `row`..`row + 15` of `tile`, which this warp alone uses.
template <class T, int Size>
__device__ __forceinline__ void store_rows(T* tile, int row, const float (&sum)[Size / 8][4], T* matrix, int64_t stride,
                                           int first, int end, int width) {
  using Tile = Layout<T, Size>;
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < Size / 8; ++n) {
    T* upper = tile + Tile::element(row + lane / 4, n * 8 + lane % 4 * 2);
    T* lower = tile + Tile::element(row + 8 + lane / 4, n * 8 + lane % 4 * 2);
    isa::store_shared(upper, Pack<T, 2>{{from_float<T>(sum[n][0]), from_float<T>(sum[n][1])}});
    isa::store_shared(lower, Pack<T, 2>{{from_float<T>(sum[n][2]), from_float<T>(sum[n][3])}});
  }
  __syncwarp();
  for (int i = lane; i < kRowsPerWarp * Tile::kChunks; i += kWarp) {
    const int r = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (first + r < end && chunk * kPerAccess<T> < width)
      store(matrix + (first + r) * stride + chunk * kPerAccess<T>, load<kPerAccess<T>>(tile + Tile::at(row + r, chunk)));
  }
}

}  // namespace cmaclip::tile
