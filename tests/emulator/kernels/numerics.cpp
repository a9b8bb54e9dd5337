// Single operations and instructions, for comparison with NumPy, PyTorch, CuTe and counts by hand.
#include "cmaclip/isa.cuh"
#include "kernel.h"

namespace isa = cmaclip::isa;

__device__ __forceinline__ int64_t global_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

template <class T>
__global__ void from_float(const float* in, T* out, int n) {
  const int64_t i = global_index();
  if (i < n) out[i] = T(in[i]);
}

template <class T>
__global__ void to_float(const T* in, float* out, int n) {
  const int64_t i = global_index();
  if (i < n) out[i] = static_cast<float>(in[i]);
}

// Sum, difference, product, quotient and fused multiply-add, n of each.
template <class T>
__global__ void arithmetic(const T* a, const T* b, const T* c, T* out, int n) {
  const int64_t i = global_index();
  if (i >= n) return;
  out[i] = a[i] + b[i];
  out[n + i] = a[i] - b[i];
  out[2 * n + i] = a[i] * b[i];
  out[3 * n + i] = a[i] / b[i];
  out[4 * n + i] = __hfma(a[i], b[i], c[i]);
}

__global__ void tf32(const float* in, uint32_t* out) { out[threadIdx.x] = isa::to_tf32(in[threadIdx.x]); }

// Registers in, registers out: a [32, 4], b [32, 2], accumulator [32, 4].
template <class T>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* accumulator) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sums[i] = accumulator[4 * lane + i];
  if constexpr (std::is_same_v<T, float>) {
    isa::mma_m16n8k8_tf32(sums, left, right);
  } else {
    isa::mma_m16n8k16<T>(sums, left, right);
  }
  for (int i = 0; i < 4; ++i) accumulator[4 * lane + i] = sums[i];
}

// rows [32, 8] of 16 bits, `stride` elements apart in shared memory -> fragments [32, Matrices].
template <int Matrices, bool Transposed>
__global__ void ldmatrix(const uint16_t* rows, uint32_t* out, int stride, int swizzle) {
  uint16_t* tile = isa::dynamic_shared<uint16_t>();
  const int lane = threadIdx.x;
  const auto place = [&](int row) { return row * stride + (swizzle != 0 ? (row % 8) * 8 : 0); };
  for (int i = 0; i < 8; ++i) tile[place(lane) + i] = rows[8 * lane + i];
  __syncwarp();
  uint32_t fragment[Matrices];
  const uint16_t* row = tile + place(lane);
  if constexpr (Matrices == 4) {
    if constexpr (Transposed) {
      isa::ldmatrix_x4_trans(fragment, row);
    } else {
      isa::ldmatrix_x4(fragment, row);
    }
  } else {
    if constexpr (Transposed) {
      isa::ldmatrix_x2_trans(fragment, row);
    } else {
      isa::ldmatrix_x2(fragment, row);
    }
  }
  for (int i = 0; i < Matrices; ++i) out[Matrices * lane + i] = fragment[i];
}

template <class T>
__global__ void strided_read(const T* in, float* out, int stride, int offset) {
  const T value = in[threadIdx.x * stride + offset];
  if constexpr (std::is_same_v<T, float4>) {
    out[threadIdx.x] = value.x + value.w;
  } else {
    out[threadIdx.x] = static_cast<float>(value);
  }
}

template <class T>
__global__ void shared_stride(float* out, int stride) {
  T* tile = isa::dynamic_shared<T>();
  tile[threadIdx.x * stride] = T{};
  out[threadIdx.x] = 0.0f;
}

__global__ void warp_functions(const int* in, int* out) {
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffffu;
  const int x = in[lane];
  out[lane] = __shfl_sync(all, x, 5);
  out[32 + lane] = __shfl_up_sync(all, x, 3);
  out[64 + lane] = __shfl_down_sync(all, x, 4, 8);
  out[96 + lane] = __shfl_xor_sync(all, x, 16);
  out[128 + lane] = static_cast<int>(__ballot_sync(all, x > 100));
  out[160 + lane] = __reduce_add_sync(all, x);
  out[192 + lane] = __reduce_max_sync(all, -x);
  out[224 + lane] = __syncthreads_count(x % 2) + 64 * __any_sync(all, x > 1000) + 128 * __all_sync(all, x >= 0);
}

// Where a thread finds itself: x, y, z of thread and block, as one number.
__global__ void indices(long long* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      ((threadIdx.z * 100LL + threadIdx.y) * 100 + threadIdx.x) * 1000000 +
      (blockIdx.z * 100LL + blockIdx.y) * 100 + blockIdx.x;
}

struct Pair {
  const float* in;
  float scale;
};
__global__ void structure(Pair pair, float* out) { out[threadIdx.x] = pair.in[threadIdx.x] * pair.scale; }

int half_of(int n) { return n / 2; }

#define BOTH(name) CMACLIP_EMULATE(#name "_half", name<__half>) CMACLIP_EMULATE(#name "_bfloat16", name<__nv_bfloat16>)
BOTH(from_float)
BOTH(to_float)
BOTH(arithmetic)
BOTH(mma)
CMACLIP_EMULATE("tf32", tf32)
CMACLIP_EMULATE("mma_tf32", mma<float>)
CMACLIP_EMULATE("ldmatrix_x2", ldmatrix<2, false>)
CMACLIP_EMULATE("ldmatrix_x2_trans", ldmatrix<2, true>)
CMACLIP_EMULATE("ldmatrix_x4", ldmatrix<4, false>)
CMACLIP_EMULATE("ldmatrix_x4_trans", ldmatrix<4, true>)
CMACLIP_EMULATE("strided_read_float", strided_read<float>)
CMACLIP_EMULATE("strided_read_float4", strided_read<float4>)
CMACLIP_EMULATE("strided_read_byte", strided_read<unsigned char>)
CMACLIP_EMULATE("shared_stride_float", shared_stride<float>)
CMACLIP_EMULATE("shared_stride_float4", shared_stride<float4>)
CMACLIP_EMULATE("warp_functions", warp_functions)
CMACLIP_EMULATE("indices", indices)
CMACLIP_EMULATE("structure", structure)
CMACLIP_EMULATE("half_of", half_of)
