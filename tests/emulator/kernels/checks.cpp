// Kernels that break one rule each where `Broken`, and keep it where not; `fault` marks the line that is to be named.
#include "cmaclip/isa.cuh"
#include "kernel.h"

namespace isa = cmaclip::isa;

// Each thread hands its value to its mirror image in the block.
template <bool Broken>
__global__ void block_barrier(const float* in, float* out) {
  __shared__ float tile[256];
  const int i = threadIdx.x, n = blockDim.x;
  tile[i] = in[i];
  if (!Broken) __syncthreads();
  out[i] = tile[n - 1 - i];  // fault: block_barrier
}

template <bool Broken>
__global__ void warp_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!Broken) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];  // fault: warp_barrier
}

// A shuffle in between makes the lanes meet, but orders no memory.
__global__ void shuffle_is_no_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  out[threadIdx.x] = tile[31 - threadIdx.x] + other;
}

// The next round's store must not overtake this round's loads.
template <bool Broken>
__global__ void overwrite_barrier(const float* in, float* out) {
  __shared__ float tile[64];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = in[64 * round + threadIdx.x];  // fault: overwrite_barrier
    __syncthreads();
    sum += tile[63 - threadIdx.x];
    if (!Broken) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

enum class Missing { nothing, wait, barrier, refill_barrier };

// Rounds of 16 bytes per thread through two buffers, read by the neighbour.
template <Missing What>
__global__ void double_buffer(const float* in, float* out, int rounds) {
  float* tile = isa::dynamic_shared<float>();
  const int i = threadIdx.x, n = blockDim.x;
  const auto fetch = [&](int round) {
    isa::cp_async_16(tile + (round % 2 * n + i) * 4, in + (round * n + i) * 4, round < rounds);
    isa::cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    if (What != Missing::wait) isa::cp_async_wait<1>();
    if (What != Missing::barrier) __syncthreads();
    for (int j = 0; j < 4; ++j) sum += tile[(round % 2 * n + (i + 1) % n) * 4 + j];
    if (What != Missing::refill_barrier) __syncthreads();
  }
  out[i] = sum;
}

template <bool Broken>
__global__ void read_bounds(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Broken ? i <= n : i < n) out[min(i, n - 1)] = in[i];  // fault: read_bounds
}

template <bool Broken>
__global__ void write_bounds(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Broken ? i <= n : i < n) out[i] = in[min(i, n - 1)];  // fault: write_bounds
}

template <bool Broken>
__global__ void shared_bounds(float* out) {
  float* tile = isa::dynamic_shared<float>();
  tile[threadIdx.x + (Broken ? 1 : 0)] = 1.0f;  // fault: shared_bounds
  out[threadIdx.x] = tile[threadIdx.x + (Broken ? 1 : 0)];
}

template <bool Broken>
__global__ void vector_alignment(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + (Broken ? 1 : 0) + 4 * threadIdx.x);  // fault: vector_alignment
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

template <bool Broken>
__global__ void uninitialised(const float* in, float* out) {
  __shared__ float tile[65];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + (Broken ? 1 : 0)];  // fault: uninitialised
}

template <bool Broken>
__global__ void divergent_shuffle(const float* in, float* out, int active) {
  const int lane = threadIdx.x;
  float value = in[lane];
  if (Broken) {
    if (lane < active) value += __shfl_down_sync(0xffffffffu, value, 1);  // fault: divergent_shuffle
  } else {
    const float other = __shfl_down_sync(0xffffffffu, value, 1);
    if (lane < active) value += other;
  }
  out[lane] = value;
}

template <bool Broken>
__global__ void divergent_barrier(float* out, int active) {
  if (static_cast<int>(threadIdx.x) >= active && Broken) return;
  __syncthreads();  // fault: divergent_barrier
  out[threadIdx.x] = 1.0f;
}

// Both halves reach a barrier, but not the same one.
template <bool Broken>
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32 && Broken) {
    __syncthreads();  // fault: two_barriers
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

template <bool Broken>
__global__ void mask_without_self(float* out) {
  const unsigned mask = Broken ? 0x0000ffffu : 0xffffffffu;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(mask, threadIdx.x < 3));  // fault: mask_without_self
}

template <bool Broken>
__global__ void block_race(const float* in, float* out) {
  if (Broken) {
    out[0] += in[blockIdx.x];  // fault: block_race
  } else {
    atomicAdd(out, in[blockIdx.x]);
  }
}

// Nothing races, but who comes first decides.
template <bool Broken>
__global__ void order_decides(int* counter, int* out) {
  const int place = atomicAdd(counter, 1);
  out[blockIdx.x] = Broken ? place : 1;
}

template <bool Broken>
__global__ void endless(const int* flag, int* out) {
  while (Broken && flag[0] == 0) {
  }
  out[0] = 1;
}

template <bool Broken>
__global__ void writes_constant(const float* in, float* out) {
  if (Broken) const_cast<float*>(in)[threadIdx.x] = 0.0f;  // fault: writes_constant
  out[threadIdx.x] = in[threadIdx.x];
}

#define PAIR(name) CMACLIP_EMULATE(#name, name<false>) CMACLIP_EMULATE(#name "_broken", name<true>)
PAIR(block_barrier)
PAIR(warp_barrier)
PAIR(overwrite_barrier)
PAIR(read_bounds)
PAIR(write_bounds)
PAIR(shared_bounds)
PAIR(vector_alignment)
PAIR(uninitialised)
PAIR(divergent_shuffle)
PAIR(divergent_barrier)
PAIR(two_barriers)
PAIR(mask_without_self)
PAIR(block_race)
PAIR(order_decides)
PAIR(endless)
PAIR(writes_constant)
CMACLIP_EMULATE("shuffle_is_no_barrier", shuffle_is_no_barrier)
CMACLIP_EMULATE("double_buffer", double_buffer<Missing::nothing>)
CMACLIP_EMULATE("double_buffer_no_wait", double_buffer<Missing::wait>)
CMACLIP_EMULATE("double_buffer_no_barrier", double_buffer<Missing::barrier>)
CMACLIP_EMULATE("double_buffer_no_refill_barrier", double_buffer<Missing::refill_barrier>)
