// Stands in for CUDA's header of the same name: bfloat16 with every operation rounded once, to nearest even.
#pragma once

#include "cuda_runtime.h"
#include "rounding.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __forceinline__ __nv_bfloat16(float value) : bits(cmaclip::emulator::float_to_bfloat16(value)) {}
  __forceinline__ __nv_bfloat16(double value)
      : bits(cmaclip::emulator::float_to_bfloat16(cmaclip::emulator::double_to_odd(value))) {}
  __forceinline__ __nv_bfloat16(int value) : __nv_bfloat16(static_cast<double>(value)) {}
  __forceinline__ operator float() const { return cmaclip::emulator::bfloat16_to_float(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

__forceinline__ float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
__forceinline__ __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
__forceinline__ __nv_bfloat16 __double2bfloat16(double value) { return __nv_bfloat16(value); }
__forceinline__ __nv_bfloat16 __int2bfloat16_rn(int value) { return __nv_bfloat16(value); }
__forceinline__ __nv_bfloat162 __float2bfloat162_rn(float value) { return {__nv_bfloat16(value), __nv_bfloat16(value)}; }
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
__forceinline__ __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {__nv_bfloat16(value.x), __nv_bfloat16(value.y)}; }
__forceinline__ float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
__forceinline__ __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
__forceinline__ __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 value) { return {value, value}; }
__forceinline__ __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
__forceinline__ float __low2float(__nv_bfloat162 value) { return value.x; }
__forceinline__ float __high2float(__nv_bfloat162 value) { return value.y; }
__forceinline__ __nv_bfloat16 __low2bfloat16(__nv_bfloat162 value) { return value.x; }
__forceinline__ __nv_bfloat16 __high2bfloat16(__nv_bfloat162 value) { return value.y; }
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return std::bit_cast<__nv_bfloat16>(bits); }

// A float's 24 bits hold twice the 16-bit formats' and two more: rounding first to float changes no result.
__forceinline__ __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(static_cast<float>(a) + static_cast<float>(b)); }
__forceinline__ __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(static_cast<float>(a) - static_cast<float>(b)); }
__forceinline__ __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(static_cast<float>(a) * static_cast<float>(b)); }
__forceinline__ __nv_bfloat16 __hdiv(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(static_cast<float>(a) / static_cast<float>(b)); }
__forceinline__ __nv_bfloat16 __hneg(__nv_bfloat16 a) { return std::bit_cast<__nv_bfloat16>(static_cast<uint16_t>(a.bits ^ 0x8000u)); }
__forceinline__ __nv_bfloat16 __habs(__nv_bfloat16 a) { return std::bit_cast<__nv_bfloat16>(static_cast<uint16_t>(a.bits & 0x7fffu)); }
__forceinline__ __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(std::fmax(static_cast<float>(a), static_cast<float>(b))); }
__forceinline__ __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(std::fmin(static_cast<float>(a), static_cast<float>(b))); }
__forceinline__ __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return __nv_bfloat16(cmaclip::emulator::fma_to_odd(a, b, c)); }
__forceinline__ __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
__forceinline__ __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
__forceinline__ __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
__forceinline__ __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

__forceinline__ __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) { return __hadd(a, b); }
__forceinline__ __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) { return __hsub(a, b); }
__forceinline__ __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) { return __hmul(a, b); }
__forceinline__ __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) { return __hdiv(a, b); }
__forceinline__ __nv_bfloat16 operator-(__nv_bfloat16 a) { return __hneg(a); }
__forceinline__ __nv_bfloat16& operator+=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = __hadd(a, b); }
__forceinline__ __nv_bfloat16& operator-=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = __hsub(a, b); }
__forceinline__ __nv_bfloat16& operator*=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = __hmul(a, b); }
__forceinline__ bool operator==(__nv_bfloat16 a, __nv_bfloat16 b) { return static_cast<float>(a) == static_cast<float>(b); }
__forceinline__ bool operator!=(__nv_bfloat16 a, __nv_bfloat16 b) { return !(a == b); }
__forceinline__ bool operator<(__nv_bfloat16 a, __nv_bfloat16 b) { return static_cast<float>(a) < static_cast<float>(b); }
__forceinline__ bool operator>(__nv_bfloat16 a, __nv_bfloat16 b) { return b < a; }
__forceinline__ bool operator<=(__nv_bfloat16 a, __nv_bfloat16 b) { return static_cast<float>(a) <= static_cast<float>(b); }
__forceinline__ bool operator>=(__nv_bfloat16 a, __nv_bfloat16 b) { return b <= a; }

CMACLIP_EMULATOR_ATOMIC(atomicAdd, __nv_bfloat16, add_bfloat16)
