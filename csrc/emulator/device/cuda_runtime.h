// Stands in for CUDA's header of the same name when the host compiler compiles device code for the emulator.
#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// `constinit` rules out a constructor at run time; `used` keeps the compiler from reasoning that nobody else writes it.
#define __shared__ static constinit __attribute__((used))
// The host compiler would carry values over barriers under the promise of restrict; CUDA's barriers forbid that.
#define __restrict__
#define __builtin_assume(condition) ((void)0)

#define CMACLIP_EMULATOR_VECTOR(name, scalar, bytes2, bytes4)        \
  struct alignas(bytes2) name##2 {                                   \
    scalar x, y;                                                     \
  };                                                                 \
  struct name##3 {                                                   \
    scalar x, y, z;                                                  \
  };                                                                 \
  struct alignas(bytes4) name##4 {                                   \
    scalar x, y, z, w;                                               \
  };                                                                 \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CMACLIP_EMULATOR_VECTOR(char, signed char, 2, 4)
CMACLIP_EMULATOR_VECTOR(uchar, unsigned char, 2, 4)
CMACLIP_EMULATOR_VECTOR(short, short, 4, 8)
CMACLIP_EMULATOR_VECTOR(ushort, unsigned short, 4, 8)
CMACLIP_EMULATOR_VECTOR(int, int, 8, 16)
CMACLIP_EMULATOR_VECTOR(uint, unsigned int, 8, 16)
CMACLIP_EMULATOR_VECTOR(float, float, 8, 16)
CMACLIP_EMULATOR_VECTOR(longlong, long long, 16, 16)
CMACLIP_EMULATOR_VECTOR(ulonglong, unsigned long long, 16, 16)
CMACLIP_EMULATOR_VECTOR(double, double, 16, 16)
#undef CMACLIP_EMULATOR_VECTOR

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// Constant as far as one thread can see: the runtime sets them whenever it switches threads.
extern const uint3 threadIdx __attribute__((visibility("default")));
extern const uint3 blockIdx __attribute__((visibility("default")));
extern const dim3 blockDim __attribute__((visibility("default")));
extern const dim3 gridDim __attribute__((visibility("default")));
constexpr int warpSize = 32;

// Barriers

__forceinline__ void __syncthreads() { cmaclip::emulator::sync_block(false); }
__forceinline__ int __syncthreads_count(int predicate) { return cmaclip::emulator::sync_block(predicate != 0); }
__forceinline__ int __syncthreads_or(int predicate) { return cmaclip::emulator::sync_block(predicate != 0) != 0; }
__forceinline__ int __syncthreads_and(int predicate) { return cmaclip::emulator::sync_block(predicate == 0) == 0; }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { cmaclip::emulator::sync_warp(mask); }
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}

// Shuffles, votes and reductions of a warp

namespace cmaclip::emulator {

template <class T>
__forceinline__ uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
__forceinline__ T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cmaclip::emulator

#define CMACLIP_EMULATOR_SHUFFLE(name, kind)                                                              \
  template <class T>                                                                                      \
  __forceinline__ T name(unsigned mask, T value, int operand, int width = 32) {                           \
    using namespace cmaclip::emulator;                                                                    \
    return from_bits<T>(shuffle(mask, to_bits(value), cmaclip::emulator::Shuffle::kind, operand, width)); \
  }
CMACLIP_EMULATOR_SHUFFLE(__shfl_sync, index)
CMACLIP_EMULATOR_SHUFFLE(__shfl_up_sync, up)
CMACLIP_EMULATOR_SHUFFLE(__shfl_down_sync, down)
CMACLIP_EMULATOR_SHUFFLE(__shfl_xor_sync, butterfly)
#undef CMACLIP_EMULATOR_SHUFFLE

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return cmaclip::emulator::ballot(mask, predicate != 0);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return cmaclip::emulator::ballot(mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return cmaclip::emulator::ballot(mask, predicate != 0) == mask;
}

#define CMACLIP_EMULATOR_REDUCE(name, type, kind)                                                \
  __forceinline__ type name(unsigned mask, type value) {                                         \
    return static_cast<type>(cmaclip::emulator::reduce(mask, static_cast<uint32_t>(value),       \
                                                       cmaclip::emulator::Reduction::kind));     \
  }
CMACLIP_EMULATOR_REDUCE(__reduce_add_sync, unsigned, add)
CMACLIP_EMULATOR_REDUCE(__reduce_add_sync, int, add)
CMACLIP_EMULATOR_REDUCE(__reduce_min_sync, unsigned, min_unsigned)
CMACLIP_EMULATOR_REDUCE(__reduce_min_sync, int, min_signed)
CMACLIP_EMULATOR_REDUCE(__reduce_max_sync, unsigned, max_unsigned)
CMACLIP_EMULATOR_REDUCE(__reduce_max_sync, int, max_signed)
CMACLIP_EMULATOR_REDUCE(__reduce_and_sync, unsigned, bit_and)
CMACLIP_EMULATOR_REDUCE(__reduce_or_sync, unsigned, bit_or)
CMACLIP_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef CMACLIP_EMULATOR_REDUCE

// Atomics

#define CMACLIP_EMULATOR_ATOMIC(name, type, kind)                                                              \
  __forceinline__ type name(type* address, type value) {                                                       \
    using namespace cmaclip::emulator;                                                                         \
    return from_bits<type>(atomic(address, sizeof(type), cmaclip::emulator::Atomic::kind, to_bits(value)));    \
  }
#define CMACLIP_EMULATOR_ATOMIC_BITS(type)               \
  CMACLIP_EMULATOR_ATOMIC(atomicAnd, type, bit_and)      \
  CMACLIP_EMULATOR_ATOMIC(atomicOr, type, bit_or)        \
  CMACLIP_EMULATOR_ATOMIC(atomicXor, type, bit_xor)      \
  CMACLIP_EMULATOR_ATOMIC(atomicExch, type, exchange)    \
  __forceinline__ type atomicCAS(type* address, type compare, type value) { \
    using namespace cmaclip::emulator;                   \
    return from_bits<type>(                              \
        atomic(address, sizeof(type), cmaclip::emulator::Atomic::compare_exchange, to_bits(value), to_bits(compare))); \
  }
CMACLIP_EMULATOR_ATOMIC(atomicAdd, int, add_integer)
CMACLIP_EMULATOR_ATOMIC(atomicAdd, unsigned, add_integer)
CMACLIP_EMULATOR_ATOMIC(atomicAdd, unsigned long long, add_integer)
CMACLIP_EMULATOR_ATOMIC(atomicAdd, float, add_float)
CMACLIP_EMULATOR_ATOMIC(atomicAdd, double, add_double)
CMACLIP_EMULATOR_ATOMIC(atomicMin, int, min_signed)
CMACLIP_EMULATOR_ATOMIC(atomicMin, unsigned, min_unsigned)
CMACLIP_EMULATOR_ATOMIC(atomicMax, int, max_signed)
CMACLIP_EMULATOR_ATOMIC(atomicMax, unsigned, max_unsigned)
CMACLIP_EMULATOR_ATOMIC(atomicExch, float, exchange)
CMACLIP_EMULATOR_ATOMIC_BITS(int)
CMACLIP_EMULATOR_ATOMIC_BITS(unsigned)
CMACLIP_EMULATOR_ATOMIC_BITS(unsigned long long)
#undef CMACLIP_EMULATOR_ATOMIC_BITS

// Loads and stores with cache hints

template <class T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
template <class T>
__forceinline__ T __ldcs(const T* address) {
  return *address;
}
template <class T>
__forceinline__ void __stcs(T* address, T value) {
  *address = value;
}

// Arithmetic

using std::max;
using std::min;
__forceinline__ unsigned max(unsigned a, int b) { return std::max(a, static_cast<unsigned>(b)); }
__forceinline__ unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
__forceinline__ long long max(long long a, int b) { return std::max(a, static_cast<long long>(b)); }
__forceinline__ long long min(long long a, int b) { return std::min(a, static_cast<long long>(b)); }

__forceinline__ int __float_as_int(float value) { return std::bit_cast<int>(value); }
__forceinline__ unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
__forceinline__ float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
__forceinline__ float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

__forceinline__ int __popc(unsigned value) { return std::popcount(value); }
__forceinline__ int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
__forceinline__ int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }

// The fast functions are an exp2 or log2 and a multiplication, as on the device.
__forceinline__ float __expf(float value) { return cmaclip::emulator::exp2_approx(value * 1.4426950408889634f); }
__forceinline__ float __logf(float value) { return std::log2(value) * 0.6931471805599453f; }
__forceinline__ float __log2f(float value) { return std::log2(value); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float value) { return 1.0f / value; }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
__forceinline__ float __fsqrt_rn(float value) { return std::sqrt(value); }
__forceinline__ float rsqrtf(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }
__forceinline__ double rsqrt(double value) { return 1.0 / std::sqrt(value); }
__forceinline__ float __saturatef(float value) { return value > 0.0f ? std::min(value, 1.0f) : 0.0f; }

__forceinline__ void __trap() { cmaclip::emulator::trap(); }
