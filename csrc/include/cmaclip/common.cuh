// Small device functions that several operators share.
#pragma once

#include <cstdint>

#include "cmaclip/isa.cuh"

namespace cmaclip {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else {
    return x;
  }
}

// `Count` neighbouring elements that move together; 16 bytes of them are one access.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T values[Count];
};

template <class T>
constexpr int kPerAccess = 16 / sizeof(T);

// tests/aot looks up in the machine code what the lines that end in "one access" have become.
template <int Count, class T>
__device__ __forceinline__ Pack<T, Count> load(const T* p) {
  if constexpr (Count == 1) return {*p};
  else return *reinterpret_cast<const Pack<T, Count>*>(p);  // one access
}

// To global memory; isa::store_shared is for shared memory.
template <class T, int Count>
__device__ __forceinline__ void store(T* p, const Pack<T, Count>& pack) {
  if constexpr (Count == 1) *p = pack.values[0];
  else *reinterpret_cast<Pack<T, Count>*>(p) = pack;  // one access
}

// The sum of the warp's values, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sum of the values of a block of `Warps` warps, in a fixed order, in thread 0. `partial` has a place for each warp.
// All threads must call it.
template <int Warps>
__device__ __forceinline__ float block_sum(float x, float* partial) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp == 0 ? warp_sum(lane < Warps ? partial[lane] : 0) : 0;
}

}  // namespace cmaclip
