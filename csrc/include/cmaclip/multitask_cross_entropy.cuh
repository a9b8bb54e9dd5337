// multitask_cross_entropy: the losses of many tasks whose classes stand side by side in the logits.
#pragma once

#include "cmaclip/common.cuh"

namespace cmaclip::multitask_cross_entropy {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// The kernels that give a block to a row and a task.
constexpr int kBlockWarps = 16;
constexpr int kBlockThreads = kBlockWarps * kWarp;
// From this mean number of classes on, a task is a block's; else a warp takes up to kTasksPerWarp tasks in turn.
constexpr int kClassesPerWarp = 1024;
constexpr int kTasksPerWarp = 4;
// What a block may have of shared memory without asking for more.
constexpr int kSharedBytes = 48 * 1024;

struct Shape {
  int64_t rows;
  int tasks, classes;
  float smoothing;
};

enum Plan : int {
  // Whole rows go through shared memory; a warp takes a row and a task.
  kTile,
  // A warp takes a row and a task.
  kWarpPerTask,
  // A block takes a row and a task.
  kBlockPerTask,
};

inline int64_t tile_bytes(int64_t classes, bool weighted, int element_bytes) {
  return classes * 16 + (weighted ? classes * element_bytes : 0);
}

// `aligned`: whether all tensors of the logits' type are, to 16 bytes.
inline int plan(int64_t classes, int64_t tasks, bool weighted, bool aligned, int element_bytes) {
  if (classes > tasks * kClassesPerWarp) return kBlockPerTask;
  return aligned && tile_bytes(classes, weighted, element_bytes) <= kSharedBytes ? kTile : kWarpPerTask;
}

// Blocks that share a row where a warp takes a row and a task.
inline int blocks_per_row(int tasks) { return (tasks + kWarps * kTasksPerWarp - 1) / (kWarps * kTasksPerWarp); }

// The rows of a tile take 16 bytes for each class, so that every tile begins at a multiple of 16 bytes.
template <class T>
constexpr int kTileRows = kPerAccess<T>;

// Infinities are not subtracted, as their difference is NaN.
__device__ __forceinline__ float finite_or_0(float x) { return fabsf(x) == INFINITY ? 0 : x; }

__device__ __forceinline__ float inverse(float weight_sum) { return weight_sum > 0 ? 1 / weight_sum : 0; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Copies `count` elements to shared memory (`ToShared`) or to global memory; both places are 16-byte aligned.
template <bool ToShared, class T>
__device__ __forceinline__ void copy(const T* in, T* out, int count) {
  constexpr int kCount = kPerAccess<T>;
  const int whole = count / kCount * kCount;
  for (int i = threadIdx.x * kCount; i < whole; i += kThreads * kCount) {
    if constexpr (ToShared) isa::store_shared(out + i, load<kCount>(in + i));
    else store(out + i, load<kCount>(in + i));
  }
  for (int i = whole + threadIdx.x; i < count; i += kThreads) out[i] = in[i];
}

// How many elements p lies past a multiple of 16 bytes; null lies as any other does.
template <class T>
__device__ __forceinline__ int misplaced(const T* p, const T* other) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p == nullptr ? other : p) % 16 / sizeof(T));
}

// Calls `visit<Count>(c)` for each class c (Count 1), or for kPerAccess classes that lie 16-byte aligned in `x`, `a` and
// `b` (either may be null); if the three lie differently, Count is 1 throughout. Threads of the block take turns.
template <class T, class Visit>
__device__ __forceinline__ void each_class(int classes, const T* x, const T* a, const T* b, const Visit& visit) {
  constexpr int kCount = kPerAccess<T>;
  const int past = misplaced(x, x);
  const bool wide = misplaced(a, x) == past && misplaced(b, x) == past;
  const int head = wide ? min((kCount - past) % kCount, classes) : classes;
  const int tail = head + (classes - head) / kCount * kCount;
  for (int c = threadIdx.x; c < head; c += kBlockThreads) visit.template operator()<1>(c);
  for (int c = head + threadIdx.x * kCount; c < tail; c += kBlockThreads * kCount)
    visit.template operator()<kCount>(c);
  for (int c = tail + threadIdx.x; c < classes; c += kBlockThreads) visit.template operator()<1>(c);
}

// The sums over the classes of a task that a thread has seen.
struct Sums {
  // The greatest logit, the sum of exponentials less that, and of the logits less `shift` times their weights.
  float most = -INFINITY, total = 0, weighted = 0, weight = 0;

  template <class T, int Count>
  __device__ __forceinline__ void add(const Pack<T, Count>& x) {
    float now = most;
#pragma unroll
    for (int i = 0; i < Count; ++i) now = fmaxf(now, to_float(x.values[i]));
    const float base = finite_or_0(now);
    if (now != most) total *= expf(most - base);
    most = now;
#pragma unroll
    for (int i = 0; i < Count; ++i) total += expf(to_float(x.values[i]) - base);
  }

  template <class T, int Count>
  __device__ __forceinline__ void add_weighted(const Pack<T, Count>& x, const T* class_weight, int c, float shift) {
    Pack<T, Count> w;
    if (class_weight != nullptr) w = load<Count>(class_weight + c);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const float factor = class_weight == nullptr ? 1 : to_float(w.values[i]);
      weighted += factor * (to_float(x.values[i]) - shift);
      weight += factor;
    }
  }

  // The sums of the warp, in every lane.
  __device__ __forceinline__ void join(bool smoothed) {
    const float now = warp_max(most);
    // A lane without classes, or with minus infinities only, adds nothing.
    total = warp_sum(total == 0 ? 0 : total * expf(finite_or_0(most) - finite_or_0(now)));
    most = now;
    if (!smoothed) return;
    weighted = warp_sum(weighted);
    weight = warp_sum(weight);
  }
};

// Writes the log-sum-exp of a row and a task, and the row's part of the task's loss and of its weight.
template <class T>
__device__ __forceinline__ void finish(Shape shape, const Sums& sums, int64_t row, int task, int classes, int64_t label,
                                       const T* x, const T* class_weight, float shift, float* lse, float* row_loss,
                                       float* row_weight) {
  const float row_lse = finite_or_0(sums.most) + logf(sums.total);
  float loss = 0, weight = 0;
  if (label >= 0) {
    const int column = static_cast<int>(min(label, int64_t{classes - 1}));
    weight = class_weight == nullptr ? 1 : to_float(class_weight[column]);
    loss = (1 - shape.smoothing) * weight * (row_lse - to_float(x[column]));
    if (shape.smoothing > 0)
      loss += shape.smoothing * ((row_lse - shift) * sums.weight - sums.weighted) / static_cast<float>(classes);
    if (label >= classes) loss = NAN;
  }
  lse[row * shape.tasks + task] = row_lse;
  // Tasks outside rows, as the next kernel reads them.
  row_loss[task * shape.rows + row] = loss;
  row_weight[task * shape.rows + row] = weight;
}

// The rows of a block of the kernels in which a warp takes a row and a task: their logits, and the class weights, are
// in shared memory if `InTile`, else where they are.
template <class T, bool InTile>
struct Rows {
  int64_t first;
  int count;
  const T* logits;
  const T* class_weight;

  __device__ __forceinline__ Rows(Shape shape, const T* all_logits, const T* all_weights) {
    first = int64_t{blockIdx.x} * (InTile ? kTileRows<T> : 1);
    count = InTile ? static_cast<int>(min(int64_t{kTileRows<T>}, shape.rows - first)) : 1;
    logits = all_logits + first * shape.classes;
    class_weight = all_weights;
    if constexpr (InTile) {
      T* tile = isa::dynamic_shared<T>();
      copy<true>(logits, tile, count * shape.classes);
      logits = tile;
      if (all_weights != nullptr) {
        T* weights = tile + kTileRows<T> * shape.classes;
        copy<true>(all_weights, weights, shape.classes);
        class_weight = weights;
      }
      __syncthreads();
    }
  }
};

// lse [B, K], row_loss and row_weight [K, B]; `class_weight` may be null. Grid ceil(B / kTileRows) if `InTile`,
// else (B, blocks_per_row); kThreads threads.
template <class T, bool InTile>
__global__ void __launch_bounds__(kThreads, 1)
    forward_warps(Shape shape, const T* __restrict__ logits, const int64_t* __restrict__ labels,
                  const int* __restrict__ offsets, const T* __restrict__ class_weight, float* __restrict__ lse,
                  float* __restrict__ row_loss, float* __restrict__ row_weight) {
  const Rows<T, InTile> rows(shape, logits, class_weight);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int item = blockIdx.y * kWarps + warp; item < rows.count * shape.tasks; item += gridDim.y * kWarps) {
    const int task = item % shape.tasks, in_tile = item / shape.tasks;
    const int64_t row = rows.first + in_tile;
    const int start = offsets[task], classes = offsets[task + 1] - start;
    const T* x = rows.logits + int64_t{in_tile} * shape.classes + start;
    const T* weight = rows.class_weight == nullptr ? nullptr : rows.class_weight + start;
    const float shift = finite_or_0(to_float(x[0]));
    Sums sums;
    for (int c = lane; c < classes; c += kWarp) {
      const Pack<T, 1> logit = load<1>(x + c);
      sums.add(logit);
      if (shape.smoothing > 0) sums.add_weighted(logit, weight, c, shift);
    }
    sums.join(shape.smoothing > 0);
    if (lane == 0)
      finish(shape, sums, row, task, classes, labels[row * shape.tasks + task], x, weight, shift, lse, row_loss,
             row_weight);
  }
}

// The same. Grid B * K, kBlockThreads threads.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    forward_blocks(Shape shape, const T* __restrict__ logits, const int64_t* __restrict__ labels,
                   const int* __restrict__ offsets, const T* __restrict__ class_weight, float* __restrict__ lse,
                   float* __restrict__ row_loss, float* __restrict__ row_weight) {
  __shared__ float partial[4][kBlockWarps];
  const int64_t row = blockIdx.x / shape.tasks;
  const int task = blockIdx.x % shape.tasks, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int start = offsets[task], classes = offsets[task + 1] - start;
  const bool smoothed = shape.smoothing > 0;
  const T* x = logits + row * shape.classes + start;
  const T* weight = class_weight == nullptr ? nullptr : class_weight + start;
  const float shift = finite_or_0(to_float(x[0]));
  Sums sums;
  each_class<T>(classes, x, smoothed ? weight : nullptr, nullptr, [&]<int Count>(int c) {
    const Pack<T, Count> logits_here = load<Count>(x + c);
    sums.add(logits_here);
    if (smoothed) sums.add_weighted(logits_here, weight, c, shift);
  });
  sums.join(smoothed);
  if (lane == 0) {
    partial[0][warp] = sums.most;
    partial[1][warp] = sums.total;
    partial[2][warp] = sums.weighted;
    partial[3][warp] = sums.weight;
  }
  __syncthreads();
  if (warp > 0) return;
  sums = {};
  if (lane < kBlockWarps) sums = {partial[0][lane], partial[1][lane], partial[2][lane], partial[3][lane]};
  sums.join(smoothed);
  if (lane == 0)
    finish(shape, sums, row, task, classes, labels[row * shape.tasks + task], x, weight, shift, lse, row_loss,
           row_weight);
}

// loss and weight_sum [K] from the rows' parts [K, B]. Grid K, kBlockThreads threads.
__global__ void __launch_bounds__(kBlockThreads, 1)
    add_rows(Shape shape, const float* __restrict__ row_loss, const float* __restrict__ row_weight,
             float* __restrict__ loss, float* __restrict__ weight_sum) {
  __shared__ float partial[2][kBlockWarps];
  const int task = blockIdx.x;
  float task_loss = 0, task_weight = 0;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < shape.rows; row += kBlockThreads) {
    task_loss += row_loss[task * shape.rows + row];
    task_weight += row_weight[task * shape.rows + row];
  }
  task_loss = block_sum<kBlockWarps>(task_loss, partial[0]);
  task_weight = block_sum<kBlockWarps>(task_weight, partial[1]);
  if (threadIdx.x > 0) return;
  loss[task] = task_loss * inverse(task_weight);
  weight_sum[task] = task_weight;
}

// totals [K], the class weights of each task summed. Grid K, kBlockThreads threads.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    add_class_weights(const int* __restrict__ offsets, const T* __restrict__ class_weight,
                      float* __restrict__ totals) {
  __shared__ float partial[kBlockWarps];
  const int task = blockIdx.x, end = offsets[task + 1];
  float total = 0;
  for (int c = offsets[task] + threadIdx.x; c < end; c += kBlockThreads) total += to_float(class_weight[c]);
  total = block_sum<kBlockWarps>(total, partial);
  if (threadIdx.x == 0) totals[task] = total;
}

// The gradient of the logits of a row and a task:
// ((label_weight + spread * weight_total) * probability - spread * weight - label_weight if the label) * scale.
template <class T>
struct Gradient {
  float label_weight, factor, spread, scale, lse;
  int label;

  __device__ __forceinline__ Gradient(Shape shape, int64_t at, int task, int classes, int64_t label_,
                                      const float* grad_loss, const T* class_weight, const float* totals,
                                      const float* all_lse, const float* weight_sum) {
    label = static_cast<int>(min(label_, int64_t{classes - 1}));
    const float weight = class_weight == nullptr ? 1 : to_float(class_weight[label]);
    label_weight = label_ < classes ? (1 - shape.smoothing) * weight : NAN;
    spread = shape.smoothing / static_cast<float>(classes);
    factor = label_weight + spread * (totals == nullptr ? static_cast<float>(classes) : totals[task]);
    scale = grad_loss[task] * inverse(weight_sum[task]);
    lse = all_lse[at];
  }

  template <int Count>
  __device__ __forceinline__ Pack<T, Count> of(const Pack<T, Count>& x, const T* class_weight, int c) const {
    Pack<T, Count> w, result;
    if (class_weight != nullptr) w = load<Count>(class_weight + c);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      float grad = factor * expf(to_float(x.values[i]) - lse);
      grad -= spread * (class_weight == nullptr ? 1 : to_float(w.values[i]));
      if (c + i == label) grad -= label_weight;
      result.values[i] = from_float<T>(grad * scale);
    }
    return result;
  }
};

// grad_logits [B, C]; `class_weight` and `totals`, the tasks' sums of it, may be null: all 1. Grid and block as
// forward_warps.
template <class T, bool InTile>
__global__ void __launch_bounds__(kThreads, 1)
    backward_warps(Shape shape, const float* __restrict__ grad_loss, const T* __restrict__ logits,
                   const int64_t* __restrict__ labels, const int* __restrict__ offsets,
                   const T* __restrict__ class_weight, const float* __restrict__ totals,
                   const float* __restrict__ lse, const float* __restrict__ weight_sum, T* __restrict__ grad_logits) {
  const Rows<T, InTile> rows(shape, logits, class_weight);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* grads = InTile ? const_cast<T*>(rows.logits) : grad_logits + rows.first * shape.classes;
  for (int item = blockIdx.y * kWarps + warp; item < rows.count * shape.tasks; item += gridDim.y * kWarps) {
    // No lane begins the next task before the others: their accesses stay together.
    __syncwarp();
    const int task = item % shape.tasks, in_tile = item / shape.tasks;
    const int64_t at = (rows.first + in_tile) * shape.tasks + task, label = labels[at];
    const int start = offsets[task], classes = offsets[task + 1] - start;
    const T* x = rows.logits + int64_t{in_tile} * shape.classes + start;
    T* grad = grads + int64_t{in_tile} * shape.classes + start;
    if (label < 0) {
      const T zero = from_float<T>(0 * grad_loss[task] * inverse(weight_sum[task]));
      for (int c = lane; c < classes; c += kWarp) grad[c] = zero;
      continue;
    }
    const T* weight = rows.class_weight == nullptr ? nullptr : rows.class_weight + start;
    const Gradient<T> gradient(shape, at, task, classes, label, grad_loss, weight, totals, lse, weight_sum);
    for (int c = lane; c < classes; c += kWarp) store(grad + c, gradient.of(load<1>(x + c), weight, c));
  }
  if constexpr (InTile) {
    __syncthreads();
    copy<false>(rows.logits, grad_logits + rows.first * shape.classes, rows.count * shape.classes);
  }
}

// The same. Grid B * K, kBlockThreads threads.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    backward_blocks(Shape shape, const float* __restrict__ grad_loss, const T* __restrict__ logits,
                    const int64_t* __restrict__ labels, const int* __restrict__ offsets,
                    const T* __restrict__ class_weight, const float* __restrict__ totals,
                    const float* __restrict__ lse, const float* __restrict__ weight_sum, T* __restrict__ grad_logits) {
  const int64_t at = blockIdx.x, row = at / shape.tasks, label = labels[at];
  const int task = static_cast<int>(at % shape.tasks), start = offsets[task], classes = offsets[task + 1] - start;
  const T* x = logits + row * shape.classes + start;
  T* grad = grad_logits + row * shape.classes + start;
  if (label < 0) {
    const T zero = from_float<T>(0 * grad_loss[task] * inverse(weight_sum[task]));
    each_class<T>(classes, grad, nullptr, nullptr, [&]<int Count>(int c) {
      Pack<T, Count> zeros;
#pragma unroll
      for (int i = 0; i < Count; ++i) zeros.values[i] = zero;
      store(grad + c, zeros);
    });
    return;
  }
  const T* weight = class_weight == nullptr ? nullptr : class_weight + start;
  const Gradient<T> gradient(shape, at, task, classes, label, grad_loss, weight, totals, lse, weight_sum);
  each_class<T>(classes, x, grad, weight,
                [&]<int Count>(int c) { store(grad + c, gradient.of(load<Count>(x + c), weight, c)); });
}

}  // namespace cmaclip::multitask_cross_entropy
