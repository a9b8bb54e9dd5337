// The launches of packed_attention for one element type; a source file each, so that they compile side by side.

#pragma once

#include "launch.h"

#include "cmaclip/packed_attention.cuh"

namespace cmaclip::packed_attention {

constexpr int kMostSize = 128;

struct Arguments {
  Shape shape;
  const int* ends_q;
  const int* ends_k;
  int64_t longest_q, longest_k;
  const void *q, *k, *v;
};

// Room for the work lists is `items`, for the greatest of both sides.
template <class T>
void launch_forward(const Arguments& arguments, Item* items, T* out, float* lse, cudaStream_t stream);

template <class T>
void launch_backward(const Arguments& arguments, Item* items, const T* out, const float* lse, const T* grad_out,
                     const float* grad_lse, float* delta, T* grad_q, T* grad_k, T* grad_v, cudaStream_t stream);

}  // namespace cmaclip::packed_attention
