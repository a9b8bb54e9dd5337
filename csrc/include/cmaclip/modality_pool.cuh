// modality_pool: scores, softmax and weighted sum of a row's modalities, for all tasks (paper, figure 1).
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::modality_pool {

constexpr int kMaxModalities = 8;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// Tasks that one block of the forward and score kernels takes, and that one warp of the weight kernel holds.
constexpr int kTasksPerBlock = 32;
constexpr int kTasksPerWarp = 4;
constexpr int kWeightWarps = 8;

struct Shape {
  int rows, modalities, tasks, width;
  // Whether the modalities of a task share one weight vector.
  bool shared;
};

// Bit m tells whether the row has modality m.
__device__ __forceinline__ unsigned present_mask(const bool* present, int modalities) {
  unsigned mask = 0;
  for (int m = 0; m < modalities; ++m) mask |= static_cast<unsigned>(present[m]) << m;
  return mask;
}

template <class T>
__device__ __forceinline__ const T* weight_of(const T* weight, Shape shape, int task, int modality) {
  const int64_t vector = shape.shared ? task : int64_t{task} * shape.modalities + modality;
  return weight + vector * shape.width;
}

// The row's embeddings [M, D]: in shared memory if `InShared` (its size is the launch's), else where they are.
// Absent modalities are neither read nor written. All threads of the block must call it.
template <class T, int Count, bool InShared>
__device__ __forceinline__ const T* row_embeddings(const T* embedding, Shape shape, unsigned mask) {
  if constexpr (!InShared) {
    return embedding;
  } else {
    T* tile = isa::dynamic_shared<T>();
    for (int i = threadIdx.x * Count; i < shape.modalities * shape.width; i += kThreads * Count)
      if (mask >> (i / shape.width) & 1) isa::store_shared(tile + i, load<Count>(embedding + i));
    __syncthreads();
    return tile;
  }
}

// weights [B, K, M] and pooled [B, K, D]. Grid (B, ceil(K / kTasksPerBlock)), kThreads threads: a warp takes a task.
template <class T, int Count, bool InShared>
__global__ void __launch_bounds__(kThreads, 1)
    forward(Shape shape, const T* __restrict__ embeddings, const T* __restrict__ weight,
            const bool* __restrict__ present, T* __restrict__ pooled, float* __restrict__ weights) {
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned mask = present_mask(present + row * shape.modalities, shape.modalities);
  const T* embedding =
      row_embeddings<T, Count, InShared>(embeddings + row * shape.modalities * shape.width, shape, mask);
  const int last = min(shape.tasks, static_cast<int>(blockIdx.y + 1) * kTasksPerBlock);
  for (int task = blockIdx.y * kTasksPerBlock + warp; task < last; task += kWarps) {
    float score[kMaxModalities] = {};
    for (int d = lane * Count; d < shape.width; d += kWarp * Count) {
      Pack<T, Count> w = load<Count>(weight_of(weight, shape, task, 0) + d);
#pragma unroll
      for (int m = 0; m < kMaxModalities; ++m) {
        if (!(mask >> m & 1)) continue;
        if (m > 0 && !shape.shared) w = load<Count>(weight_of(weight, shape, task, m) + d);
        const Pack<T, Count> e = load<Count>(embedding + m * shape.width + d);
#pragma unroll
        for (int i = 0; i < Count; ++i) score[m] += to_float(w.values[i]) * to_float(e.values[i]);
      }
    }
    float most = -INFINITY, total = 0, mine = 0;
#pragma unroll
    for (int m = 0; m < kMaxModalities; ++m) {
      if (!(mask >> m & 1)) continue;
      score[m] = warp_sum(score[m]);
      most = fmaxf(most, score[m]);
    }
#pragma unroll
    for (int m = 0; m < kMaxModalities; ++m) {
      score[m] = mask >> m & 1 ? expf(score[m] - most) : 0;
      total += score[m];
    }
#pragma unroll
    for (int m = 0; m < kMaxModalities; ++m) {
      if (mask >> m & 1) score[m] /= total;
      if (lane == m) mine = score[m];
    }
    const int64_t out = row * shape.tasks + task;
    if (lane < shape.modalities) weights[out * shape.modalities + lane] = mine;
    for (int d = lane * Count; d < shape.width; d += kWarp * Count) {
      float sum[Count] = {};
#pragma unroll
      for (int m = 0; m < kMaxModalities; ++m) {
        if (!(mask >> m & 1)) continue;
        const Pack<T, Count> e = load<Count>(embedding + m * shape.width + d);
#pragma unroll
        for (int i = 0; i < Count; ++i) sum[i] += score[m] * to_float(e.values[i]);
      }
      Pack<T, Count> result;
#pragma unroll
      for (int i = 0; i < Count; ++i) result.values[i] = from_float<T>(sum[i]);
      store(pooled + out * shape.width + d, result);
    }
  }
}

// grad_scores [B, K, M], the gradient before the softmax; `grad_weights` may be null. Grid and block as forward.
template <class T, int Count, bool InShared>
__global__ void __launch_bounds__(kThreads, 1)
    backward_scores(Shape shape, const T* __restrict__ grad_pooled, const float* __restrict__ grad_weights,
                    const T* __restrict__ embeddings, const bool* __restrict__ present,
                    const float* __restrict__ weights, float* __restrict__ grad_scores) {
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned mask = present_mask(present + row * shape.modalities, shape.modalities);
  const T* embedding =
      row_embeddings<T, Count, InShared>(embeddings + row * shape.modalities * shape.width, shape, mask);
  const int last = min(shape.tasks, static_cast<int>(blockIdx.y + 1) * kTasksPerBlock);
  for (int task = blockIdx.y * kTasksPerBlock + warp; task < last; task += kWarps) {
    const int64_t out = row * shape.tasks + task;
    float product[kMaxModalities] = {};
    for (int d = lane * Count; d < shape.width; d += kWarp * Count) {
      const Pack<T, Count> grad = load<Count>(grad_pooled + out * shape.width + d);
#pragma unroll
      for (int m = 0; m < kMaxModalities; ++m) {
        if (!(mask >> m & 1)) continue;
        const Pack<T, Count> e = load<Count>(embedding + m * shape.width + d);
#pragma unroll
        for (int i = 0; i < Count; ++i) product[m] += to_float(grad.values[i]) * to_float(e.values[i]);
      }
    }
    const bool mine = lane < shape.modalities;
    const float weight = mine ? weights[out * shape.modalities + lane] : 0;
    float grad = mine && grad_weights != nullptr ? grad_weights[out * shape.modalities + lane] : 0;
#pragma unroll
    for (int m = 0; m < kMaxModalities; ++m) {
      if (!(mask >> m & 1)) continue;
      const float sum = warp_sum(product[m]);
      if (lane == m) grad += sum;
    }
    const float mean = warp_sum(mask >> lane & 1 ? weight * grad : 0);
    if (mine) grad_scores[out * shape.modalities + lane] = mask >> lane & 1 ? weight * (grad - mean) : 0;
  }
}

// grad_embeddings [B, M, D]. Grid (B, ceil(D / (kThreads * Count))), kThreads threads: a thread takes Count columns.
template <class T, int Count>
__global__ void __launch_bounds__(kThreads, 1)
    backward_embeddings(Shape shape, const T* __restrict__ grad_pooled, const T* __restrict__ weight,
                        const bool* __restrict__ present, const float* __restrict__ weights,
                        const float* __restrict__ grad_scores, T* __restrict__ grad_embeddings) {
  const int64_t row = blockIdx.x;
  const int d = (blockIdx.y * kThreads + threadIdx.x) * Count;
  if (d >= shape.width) return;
  const unsigned mask = present_mask(present + row * shape.modalities, shape.modalities);
  float sum[kMaxModalities][Count] = {};
  for (int task = 0; task < shape.tasks; ++task) {
    const int64_t at = row * shape.tasks + task;
    const Pack<T, Count> grad = load<Count>(grad_pooled + at * shape.width + d);
    Pack<T, Count> w = load<Count>(weight_of(weight, shape, task, 0) + d);
#pragma unroll
    for (int m = 0; m < kMaxModalities; ++m) {
      if (!(mask >> m & 1)) continue;
      if (m > 0 && !shape.shared) w = load<Count>(weight_of(weight, shape, task, m) + d);
      const float share = weights[at * shape.modalities + m], slope = grad_scores[at * shape.modalities + m];
#pragma unroll
      for (int i = 0; i < Count; ++i)
        sum[m][i] += share * to_float(grad.values[i]) + slope * to_float(w.values[i]);
    }
  }
#pragma unroll
  for (int m = 0; m < kMaxModalities; ++m) {
    if (m >= shape.modalities) break;
    Pack<T, Count> result;
#pragma unroll
    for (int i = 0; i < Count; ++i) result.values[i] = from_float<T>(sum[m][i]);
    store(grad_embeddings + (row * shape.modalities + m) * shape.width + d, result);
  }
}

// grad_weight [K, M, D] or [K, 1, D], rows summed in a fixed order. Grid (ceil(D / (kWarp * Count)),
// ceil(K / kTasksPerWarp), M or 1), kWeightWarps * kWarp threads: each warp sums every kWeightWarps-th row.
template <class T, int Count>
__global__ void __launch_bounds__(kWeightWarps* kWarp, 1)
    backward_weight(Shape shape, const T* __restrict__ embeddings, const bool* __restrict__ present,
                    const float* __restrict__ grad_scores, T* __restrict__ grad_weight) {
  // Room for each lane's i-th element; so far apart that neighbouring columns lie in different banks.
  constexpr int kPlane = kWarp + kWarp / Count;
  __shared__ float partial[kWeightWarps][kTasksPerWarp][kPlane * Count];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_column = blockIdx.x * kWarp * Count, first_task = blockIdx.y * kTasksPerWarp;
  const int first_modality = blockIdx.z, last_modality = shape.shared ? shape.modalities : first_modality + 1;
  const int d = first_column + lane * Count;
  float sum[kTasksPerWarp][Count] = {};
  if (d < shape.width) {
    for (int64_t row = warp; row < shape.rows; row += kWeightWarps) {
      for (int m = first_modality; m < last_modality; ++m) {
        if (!present[row * shape.modalities + m]) continue;
        const Pack<T, Count> e = load<Count>(embeddings + (row * shape.modalities + m) * shape.width + d);
#pragma unroll
        for (int t = 0; t < kTasksPerWarp; ++t) {
          if (first_task + t >= shape.tasks) break;
          const float slope = grad_scores[(row * shape.tasks + first_task + t) * shape.modalities + m];
#pragma unroll
          for (int i = 0; i < Count; ++i) sum[t][i] += slope * to_float(e.values[i]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTasksPerWarp; ++t)
#pragma unroll
    for (int i = 0; i < Count; ++i) partial[warp][t][i * kPlane + lane] = sum[t][i];
  __syncthreads();
  for (int at = threadIdx.x; at < kTasksPerWarp * kWarp * Count; at += kWeightWarps * kWarp) {
    const int t = at / (kWarp * Count), column = at % (kWarp * Count);
    if (first_task + t >= shape.tasks || first_column + column >= shape.width) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWeightWarps; ++w) total += partial[w][t][column % Count * kPlane + column / Count];
    const int64_t vector = shape.shared ? first_task + t : int64_t{first_task + t} * shape.modalities + first_modality;
    grad_weight[vector * shape.width + first_column + column] = from_float<T>(total);
  }
}

}  // namespace cmaclip::modality_pool
