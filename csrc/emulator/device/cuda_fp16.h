// Stands in for CUDA's header of the same name: half with every operation rounded once, to nearest even.
#pragma once

#include "cuda_runtime.h"
#include "rounding.h"

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  __forceinline__ __half(float value) : bits(cmaclip::emulator::float_to_half(value)) {}
  __forceinline__ __half(double value)
      : bits(cmaclip::emulator::float_to_half(cmaclip::emulator::double_to_odd(value))) {}
  __forceinline__ __half(int value) : __half(static_cast<double>(value)) {}
  __forceinline__ operator float() const { return cmaclip::emulator::half_to_float(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

__forceinline__ float __half2float(__half value) { return static_cast<float>(value); }
__forceinline__ __half __float2half(float value) { return __half(value); }
__forceinline__ __half __float2half_rn(float value) { return __half(value); }
__forceinline__ __half __double2half(double value) { return __half(value); }
__forceinline__ __half __int2half_rn(int value) { return __half(value); }
__forceinline__ __half2 __float2half2_rn(float value) { return {__half(value), __half(value)}; }
__forceinline__ __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
__forceinline__ __half2 __float22half2_rn(float2 value) { return {__half(value.x), __half(value.y)}; }
__forceinline__ float2 __half22float2(__half2 value) { return {value.x, value.y}; }
__forceinline__ __half2 __halves2half2(__half x, __half y) { return {x, y}; }
__forceinline__ __half2 __half2half2(__half value) { return {value, value}; }
__forceinline__ __half2 make_half2(__half x, __half y) { return {x, y}; }
__forceinline__ float __low2float(__half2 value) { return value.x; }
__forceinline__ float __high2float(__half2 value) { return value.y; }
__forceinline__ __half __low2half(__half2 value) { return value.x; }
__forceinline__ __half __high2half(__half2 value) { return value.y; }
__forceinline__ unsigned short __half_as_ushort(__half value) { return value.bits; }
__forceinline__ __half __ushort_as_half(unsigned short bits) { return std::bit_cast<__half>(bits); }

// A float's 24 bits hold twice the 16-bit formats' and two more: rounding first to float changes no result.
__forceinline__ __half __hadd(__half a, __half b) { return __half(static_cast<float>(a) + static_cast<float>(b)); }
__forceinline__ __half __hsub(__half a, __half b) { return __half(static_cast<float>(a) - static_cast<float>(b)); }
__forceinline__ __half __hmul(__half a, __half b) { return __half(static_cast<float>(a) * static_cast<float>(b)); }
__forceinline__ __half __hdiv(__half a, __half b) { return __half(static_cast<float>(a) / static_cast<float>(b)); }
__forceinline__ __half __hneg(__half a) { return std::bit_cast<__half>(static_cast<uint16_t>(a.bits ^ 0x8000u)); }
__forceinline__ __half __habs(__half a) { return std::bit_cast<__half>(static_cast<uint16_t>(a.bits & 0x7fffu)); }
__forceinline__ __half __hmax(__half a, __half b) { return __half(std::fmax(static_cast<float>(a), static_cast<float>(b))); }
__forceinline__ __half __hmin(__half a, __half b) { return __half(std::fmin(static_cast<float>(a), static_cast<float>(b))); }
__forceinline__ __half __hfma(__half a, __half b, __half c) { return __half(cmaclip::emulator::fma_to_odd(a, b, c)); }
__forceinline__ __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
__forceinline__ __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
__forceinline__ __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
__forceinline__ __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

__forceinline__ __half operator+(__half a, __half b) { return __hadd(a, b); }
__forceinline__ __half operator-(__half a, __half b) { return __hsub(a, b); }
__forceinline__ __half operator*(__half a, __half b) { return __hmul(a, b); }
__forceinline__ __half operator/(__half a, __half b) { return __hdiv(a, b); }
__forceinline__ __half operator-(__half a) { return __hneg(a); }
__forceinline__ __half& operator+=(__half& a, __half b) { return a = __hadd(a, b); }
__forceinline__ __half& operator-=(__half& a, __half b) { return a = __hsub(a, b); }
__forceinline__ __half& operator*=(__half& a, __half b) { return a = __hmul(a, b); }
__forceinline__ bool operator==(__half a, __half b) { return static_cast<float>(a) == static_cast<float>(b); }
__forceinline__ bool operator!=(__half a, __half b) { return !(a == b); }
__forceinline__ bool operator<(__half a, __half b) { return static_cast<float>(a) < static_cast<float>(b); }
__forceinline__ bool operator>(__half a, __half b) { return b < a; }
__forceinline__ bool operator<=(__half a, __half b) { return static_cast<float>(a) <= static_cast<float>(b); }
__forceinline__ bool operator>=(__half a, __half b) { return b <= a; }

CMACLIP_EMULATOR_ATOMIC(atomicAdd, __half, add_half)
