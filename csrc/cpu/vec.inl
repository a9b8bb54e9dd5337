// Vectors of CMACLIP_LANES floats, for one instruction set; included by targets.h inside its namespace.

constexpr int kLanes = CMACLIP_LANES;

typedef float Vec __attribute__((vector_size(4 * CMACLIP_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * CMACLIP_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * CMACLIP_LANES)));
typedef uint16_t HalfBitVec __attribute__((vector_size(2 * CMACLIP_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * CMACLIP_LANES), aligned(4), may_alias));
typedef uint16_t UnalignedHalfBitVec __attribute__((vector_size(2 * CMACLIP_LANES), aligned(2), may_alias));

inline Vec splat(float x) {
  return x - Vec{};
}

inline Vec load(const float* p) {
  return *reinterpret_cast<const UnalignedVec*>(p);
}

inline Vec load(const torch::headeronly::BFloat16* p) {
  const HalfBitVec bits = *reinterpret_cast<const UnalignedHalfBitVec*>(p);
  return (Vec)(__builtin_convertvector(bits, BitVec) << 16);
}

inline void store(float* p, Vec x) {
  *reinterpret_cast<UnalignedVec*>(p) = x;
}

inline void store(torch::headeronly::BFloat16* p, Vec x) {
  const BitVec bits = (BitVec)x;
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec nan = (bits >> 16) | 0x40u;
  const BitVec result = (x == x) ? rounded : nan;
  *reinterpret_cast<UnalignedHalfBitVec*>(p) = __builtin_convertvector(result, HalfBitVec);
}

inline IntVec lane_numbers() {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// The first `count` elements, the other lanes 0. A copy on the stack would stall the load that follows it, so x86 masks.
inline Vec load(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__x86_64__) && CMACLIP_LANES == 16
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__x86_64__) && CMACLIP_LANES == 8
  return (Vec)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < static_cast<int32_t>(count)));
#else
  float part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(float));
  return load(part);
#endif
}

template <typename T>
inline Vec load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

inline void store(float* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
#if defined(__x86_64__) && CMACLIP_LANES == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#elif defined(__x86_64__) && CMACLIP_LANES == 8
  _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < static_cast<int32_t>(count)), (__m256)x);
#else
  std::memcpy(p, &x, count * sizeof(float));
#endif
}

template <typename T>
inline void store(T* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

inline Vec greater(Vec a, Vec b) {
  return a > b ? a : b;
}

// Lane j takes lane `(j + Steps) % kLanes`.
template <int Steps, int... J>
inline Vec rotate(Vec x, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, ((J + Steps) % kLanes)...);
#else
  return __builtin_shuffle(x, IntVec{((J + Steps) % kLanes)...});
#endif
}

template <int Half = kLanes / 2>
inline float sum(Vec x) {
  x += rotate<Half>(x, std::make_integer_sequence<int, kLanes>{});
  if constexpr (Half > 1) return sum<Half / 2>(x);
  return x[0];
}

template <int Half = kLanes / 2>
inline float greatest(Vec x) {
  x = greater(rotate<Half>(x, std::make_integer_sequence<int, kLanes>{}), x);
  if constexpr (Half > 1) return greatest<Half / 2>(x);
  return x[0];
}

// For each lane j, the lane of `a` and `b` one after the other that a step of `transpose` takes.
template <int Half, int... J>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(a, b, (J & Half ? kLanes + J - Half : J)...);
  b = __builtin_shufflevector(a, b, (J & Half ? kLanes + J : J + Half)...);
#else
  const Vec low = __builtin_shuffle(a, b, IntVec{(J & Half ? kLanes + J - Half : J)...});
  b = __builtin_shuffle(a, b, IntVec{(J & Half ? kLanes + J : J + Half)...});
#endif
  a = low;
}

// Row i becomes column i: halves are exchanged, then quarters, and so on.
template <int Half = kLanes / 2>
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & Half) == 0) exchange<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes>{});
  if constexpr (Half > 1) transpose<Half / 2>(rows);
}

// Lane j takes lane j of `a` and `b` added to the one `Half` away: of `a` where j lacks the bit `Half`, else of `b`.
template <int Half, int... J>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (J & Half ? kLanes + J : J)...) +
         __builtin_shufflevector(a, b, (J & Half ? kLanes + J - Half : J + Half)...);
#else
  return __builtin_shuffle(a, b, IntVec{(J & Half ? kLanes + J : J)...}) +
         __builtin_shuffle(a, b, IntVec{(J & Half ? kLanes + J - Half : J + Half)...});
#endif
}

// Lane i becomes the sum of the lanes of parts[i]; `parts` is used up.
template <int Half = kLanes / 2>
inline Vec lane_sums(Vec (&parts)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Half; ++i)
    parts[i] = fold<Half>(parts[i], parts[i + Half], std::make_integer_sequence<int, kLanes>{});
  if constexpr (Half > 1) return lane_sums<Half / 2>(parts);
  return parts[0];
}

// 2 to the power x; 0 below the least normal result. Relative error at most 1e-7 for x <= 127; NaN stays NaN.
inline Vec power_of_two(Vec x) {
  // Adding 1.5 * 2^23 rounds to the nearest integer; 127 more leaves the result's exponent in the low bits.
  const float shift = 12582912.0f + 127;
  const Vec shifted = x + shift;
  const Vec r = x - (shifted - shift);
  Vec p = splat(1.53533620e-4f);
  p = p * r + 1.33988750e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  p = p * (Vec)((IntVec)shifted << 23);
  return x < -126.0f ? Vec{} : p;
}

// e to the power x; 0 below the least normal result. Relative error at most 2e-7 for x <= 88.
inline Vec exponential(Vec x) {
  const Vec least = splat(-87.33654f), most = splat(88.72283f);
  const IntVec vanishes = x < least;
  x = x > most ? most : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors, since 2^128 alone is past the greatest float.
  const IntVec exponent = (IntVec)shifted - 0x4b400000;
  const IntVec low = exponent >> 1, high = exponent - low;
  p = p * (Vec)((low + 127) << 23) * (Vec)((high + 127) << 23);
  return vanishes ? Vec{} : p;
}
