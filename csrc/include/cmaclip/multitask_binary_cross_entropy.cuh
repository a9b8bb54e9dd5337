// multitask_binary_cross_entropy: the losses of many tasks that may each have several of their classes.
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::multitask_binary_cross_entropy {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// Rows that a thread goes through in turn, of one column.
constexpr int kRows = 16;

struct Shape {
  int64_t rows;
  int tasks, classes;
  float gamma_positive, gamma_negative, margin;
};

// Of an element whose target is known.
struct Term {
  float loss, slope;
};

__device__ __forceinline__ Term term(const Shape& shape, float logit, int target) {
  if (target > 1) return {NAN, NAN};
  const bool positive = target > 0;
  // Having a class is what not having it is at the opposite logit.
  const float x = positive ? -logit : logit;
  const float gamma = positive ? shape.gamma_positive : shape.gamma_negative;
  const float small = expf(-fabsf(x)), more = log1pf(small), big = 1 / (1 + small);
  const float p = x >= 0 ? big : small * big, other = x >= 0 ? small * big : big;
  if (!positive && shape.margin > 0) {
    if (p <= shape.margin) return {0, 0};
    const float q = p - shape.margin, rest = other + shape.margin;
    const float log_rest = q < 0.5f ? -log1pf(-q) : -logf(rest);
    if (!(gamma > 0)) return {log_rest, p * other / rest};
    const float focus = expf(gamma * logf(q));
    return {focus * log_rest, p * other * focus * (gamma * log_rest / q + 1 / rest)};
  }
  // A sum with x, unlike a maximum, keeps a NaN.
  float loss = (x < 0 ? 0 : x) + more, slope = p;
  // An exponent of 0 counts for nothing at infinite logits too.
  if (gamma > 0) {
    const float focus = expf(-gamma * ((x > 0 ? 0 : -x) + more));
    slope = focus * (p + gamma * other * loss);
    loss *= focus;
  }
  return {loss, positive ? -slope : slope};
}

// Parts [ceil(B / kRows), C] of the losses, added over the rows of a part and weighted, and of the weights.
// `class_weight` may be null: all 1. Grid ceil(C / kThreads), ceil(B / kRows); kThreads threads.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_columns(Shape shape, const T* __restrict__ logits, const int8_t* __restrict__ targets,
                const T* __restrict__ class_weight, float* __restrict__ losses, float* __restrict__ weights) {
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= shape.classes) return;
  const int64_t first = int64_t{blockIdx.y} * kRows, last = min(first + kRows, shape.rows);
  float loss = 0, known = 0;
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * shape.classes + c;
    const int target = targets[at];
    if (target < 0) continue;
    loss += term(shape, to_float(logits[at]), target).loss;
    known += 1;
  }
  const float weight = class_weight == nullptr ? 1 : to_float(class_weight[c]);
  const int64_t part = int64_t{blockIdx.y} * shape.classes + c;
  losses[part] = loss * weight;
  weights[part] = known * weight;
}

__device__ __forceinline__ float inverse(float weight_sum) { return weight_sum > 0 ? 1 / weight_sum : 0; }

// loss and weight_sum [K] from `parts` parts. Grid K, kThreads threads.
__global__ void __launch_bounds__(kThreads, 1)
    add_parts(int parts, int classes, const int* __restrict__ offsets, const float* __restrict__ losses,
              const float* __restrict__ weights, float* __restrict__ loss, float* __restrict__ weight_sum) {
  __shared__ float partial[2][kWarps];
  const int task = blockIdx.x, begin = offsets[task], end = offsets[task + 1];
  float task_loss = 0, task_weight = 0;
  for (int part = 0; part < parts; ++part)
    for (int c = begin + threadIdx.x; c < end; c += kThreads) {
      task_loss += losses[int64_t{part} * classes + c];
      task_weight += weights[int64_t{part} * classes + c];
    }
  task_loss = block_sum<kWarps>(task_loss, partial[0]);
  task_weight = block_sum<kWarps>(task_weight, partial[1]);
  if (threadIdx.x > 0) return;
  loss[task] = task_loss * inverse(task_weight);
  weight_sum[task] = task_weight;
}

// scales [C], what each column's slopes are multiplied by. Grid K, kThreads threads.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    scale_columns(const int* __restrict__ offsets, const float* __restrict__ grad_loss,
                  const float* __restrict__ weight_sum, const T* __restrict__ class_weight,
                  float* __restrict__ scales) {
  const int task = blockIdx.x, end = offsets[task + 1];
  const float scale = grad_loss[task] * inverse(weight_sum[task]);
  for (int c = offsets[task] + threadIdx.x; c < end; c += kThreads)
    scales[c] = class_weight == nullptr ? scale : scale * to_float(class_weight[c]);
}

// grad_logits [B, C]. Grid and block as sum_columns.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gradient(Shape shape, const T* __restrict__ logits, const int8_t* __restrict__ targets,
             const float* __restrict__ scales, T* __restrict__ grad_logits) {
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= shape.classes) return;
  const int64_t first = int64_t{blockIdx.y} * kRows, last = min(first + kRows, shape.rows);
  const float scale = scales[c];
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * shape.classes + c;
    const int target = targets[at];
    const float slope = target < 0 ? 0 : term(shape, to_float(logits[at]), target).slope;
    grad_logits[at] = from_float<T>(slope * scale);
  }
}

}  // namespace cmaclip::multitask_binary_cross_entropy
