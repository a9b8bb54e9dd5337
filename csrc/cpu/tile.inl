// The innermost product of matrices, one tile of the result at a time, which stays in registers.

constexpr int64_t kTileColumns = CMACLIP_REGISTERS == 32 ? 4 : 2;

// The rows of a tile of `columns` vectors: as many as leave registers for one row of b and one element of a.
constexpr int tile_rows(int columns) {
  constexpr int wide[] = {0, 12, 12, 8, 6}, narrow[] = {0, 10, 6};
  return CMACLIP_REGISTERS == 32 ? wide[columns] : narrow[columns];
}

// c = a b, or c = factor c + a b if `add`: a is [R, depth], or [depth, R] if Across, b [depth, C vectors], c [R, C].
// With every step of `depth` it asks for Lines cache lines from `ahead` on, which moves on by `stride` bytes.
template <int R, int C, bool Across, int Lines = 0>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                                             float* c, int64_t ldc, bool add, const float* factor,
                                             const char* ahead = nullptr, int64_t stride = 0) {
  Vec total[R][C] = {};
  // Every third row has a pointer, and the others an offset that an address can hold.
  constexpr int kPointers = (R + 2) / 3;
  const float* row[kPointers];
#pragma GCC unroll 8
  for (int p = 0; p < kPointers; ++p) row[p] = a + 3 * p * lda;
  for (int64_t k = 0; k < depth; ++k) {
    Vec across[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) across[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(Across ? a[r] : row[r / 3][r % 3 * lda]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) total[r][j] += x * across[j];
    }
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
    if (Lines > 0) ahead += stride;
    b += ldb;
    if (Across) a += lda;
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) ++row[p];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* const to = c + r * ldc + j * kLanes;
      // What is there is added last, which keeps the error of a sum in many blocks small.
      if (add) total[r][j] += (factor == nullptr ? 1 : factor[r]) * load(to);
      store(to, total[r][j]);
    }
}

template <int R, int C, bool Across, int Lines = 0, typename... Arguments>
inline void multiply_rows(int64_t rows, Arguments... arguments) {
  if (rows == R) return multiply_tile<R, C, Across, Lines>(arguments...);
  if constexpr (R > 1) multiply_rows<R - 1, C, Across, Lines>(rows, arguments...);
}
