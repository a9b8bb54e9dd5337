// Included by the source file of each element type, which then names its instances.

#pragma once

#include <torch/csrc/stable/macros.h>

#include "packed_attention.h"

namespace cmaclip::packed_attention {

// Calls `run` with the least of the head sizes that are compiled as a constant.
template <class F>
void for_head_size(int size, const F& run) {
  if (size <= 32) return run(std::integral_constant<int, 32>{});
  if (size <= 64) return run(std::integral_constant<int, 64>{});
  if (size <= 80) return run(std::integral_constant<int, 80>{});
  if (size <= 96) return run(std::integral_constant<int, 96>{});
  return run(std::integral_constant<int, kMostSize>{});
}

// Plans the tiles of one side and launches `kernel` on them.
template <class Kernel, class... Rest>
void launch_tiles(Kernel kernel, int tokens, int warps, int bytes, const Shape& shape, const int* tiled_ends,
                  const int* other_ends, Item* items, cudaStream_t stream, Rest... rest) {
  const int tile = warps * kRowsPerWarp, limit = work_list::most_items(tokens, shape.rows, tile);
  work_list::plan<kTokensPerCost><<<1, kWarp, 0, stream>>>(shape.rows, tokens, tile, limit, tiled_ends, other_ends, items);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<dim3(limit, shape.heads), warps * kWarp, bytes, stream>>>(shape, items, rest...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_forward(const Arguments& a, Item* items, T* out, float* lse, cudaStream_t stream) {
  const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
  if (a.shape.queries == 0) return;
  for_head_size(a.shape.size, [&](auto size) {
    const int warps = warps_for(a.longest_q), bytes = forward_bytes<T, size>(warps);
    launch_tiles(forward<T, size>, a.shape.queries, warps, bytes, a.shape, a.ends_q, a.ends_k, items, stream, a.ends_q,
                 a.ends_k, q, k, v, out, lse);
  });
}

template <class T>
void launch_backward(const Arguments& a, Item* items, const T* out, const float* lse, const T* grad_out,
                     const float* grad_lse, float* delta, T* grad_q, T* grad_k, T* grad_v, cudaStream_t stream) {
  const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
  if (a.shape.queries > 0) {
    constexpr int kThreads = kMostWarps * kWarp;
    const int64_t lanes = int64_t{a.shape.queries} * (128 / kPerAccess<T>);
    backward_delta<T><<<dim3(ceil_div(lanes, kThreads), a.shape.heads), kThreads, 0, stream>>>(a.shape, out, grad_out,
                                                                                             grad_lse, delta);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for_head_size(a.shape.size, [&](auto size) {
    constexpr int kMost = kMostGradWarps<T, size>;
    if (a.shape.queries > 0) {
      const int warps = warps_for(a.longest_q, kMost), bytes = backward_bytes<T, size>(warps);
      launch_tiles(backward<T, size, false>, a.shape.queries, warps, bytes, a.shape, a.ends_q, a.ends_k, items, stream,
                   a.ends_q, a.ends_k, q, k, v, grad_out, lse, delta, grad_q, static_cast<T*>(nullptr));
    }
    if (a.shape.keys > 0) {
      const int warps = warps_for(a.longest_k, kMost), bytes = backward_bytes<T, size>(warps);
      launch_tiles(backward<T, size, true>, a.shape.keys, warps, bytes, a.shape, a.ends_k, a.ends_q, items, stream,
                   a.ends_q, a.ends_k, q, k, v, grad_out, lse, delta, grad_k, grad_v);
    }
  });
}

#define CMACLIP_INSTANTIATE(T)                                                                                   \
  template void launch_forward<T>(const Arguments&, Item*, T*, float*, cudaStream_t);                            \
  template void launch_backward<T>(const Arguments&, Item*, const T*, const float*, const T*, const float*, float*, T*, \
                                   T*, T*, cudaStream_t)

}  // namespace cmaclip::packed_attention
