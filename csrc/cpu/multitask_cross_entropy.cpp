// multitask_cross_entropy on the CPU: pieces of the classes of a row and a task are shared among the threads.

#include "tensors.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace cmaclip {

// Some classes of one task, as columns of the logits; small enough that a row's stay in the cache.
struct ClassPiece {
  int64_t task, task_begin, begin, end;
};

// Of one piece of a row: the greatest logit, the sum of exponentials less that, and the weighted sum of the logits less
// the task's first.
struct PieceSums {
  float most, total, weighted;
};

// Infinities are not subtracted, as their difference is NaN.
inline float finite_or_0(float x) {
  return std::isinf(x) ? 0 : x;
}

}  // namespace cmaclip

#define CMACLIP_KERNELS "multitask_cross_entropy.inl"
#include "targets.h"

namespace cmaclip {
namespace {

constexpr int64_t kPieceClasses = 8192;
// What an exponential costs, in multiplications.
constexpr int64_t kExponential = 8;

std::vector<ClassPiece> pieces_of(const Tensor& offsets) {
  std::vector<ClassPiece> pieces;
  const int32_t* ends = data<int32_t>(offsets);
  for (int64_t k = 0; k + 1 < offsets.size(0); ++k)
    for (int64_t begin = ends[k]; begin < ends[k + 1]; begin += kPieceClasses)
      pieces.push_back({k, ends[k], begin, std::min<int64_t>(begin + kPieceClasses, ends[k + 1])});
  return pieces;
}

int64_t grain_of(const Tensor& logits, const std::vector<ClassPiece>& pieces) {
  return grain(kExponential * logits.size(1) / std::max<int64_t>(pieces.size(), 1));
}

// The class weights of each task, summed.
template <typename T>
std::vector<float> weight_totals(const Tensor& offsets, const std::optional<Tensor>& class_weight) {
  const int32_t* ends = data<int32_t>(offsets);
  std::vector<float> totals(offsets.size(0) - 1);
  for (size_t k = 0; k < totals.size(); ++k) {
    const int64_t classes = ends[k + 1] - ends[k];
    totals[k] = class_weight ? CMACLIP_DISPATCH(sum_of)(data<T>(*class_weight) + ends[k], classes) : classes;
  }
  return totals;
}

float inverse(float weight_sum) {
  return weight_sum > 0 ? 1 / weight_sum : 0;
}

std::tuple<Tensor, Tensor, Tensor> multitask_cross_entropy_forward(const Tensor logits, const Tensor labels,
                                                                   const Tensor offsets,
                                                                   const std::optional<Tensor> class_weight,
                                                                   double label_smoothing) {
  const int64_t rows = labels.size(0), tasks = labels.size(1), classes = logits.size(1);
  Tensor loss = new_tensor(logits, {tasks}, ScalarType::Float);
  Tensor lse = new_tensor(logits, {rows, tasks}, ScalarType::Float);
  Tensor weight_sum = new_tensor(logits, {tasks}, ScalarType::Float);
  const std::vector<ClassPiece> pieces = pieces_of(offsets);
  std::vector<PieceSums> sums(rows * pieces.size());
  std::vector<float> row_loss(rows * tasks), row_weight(rows * tasks);
  const int32_t* ends = data<int32_t>(offsets);
  const bool smoothed = label_smoothing > 0;
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* weight = data<T>(class_weight);
    torch::stable::parallel_for(0, sums.size(), grain_of(logits, pieces), [&](int64_t begin, int64_t end) {
      CMACLIP_DISPATCH(reduce_pieces)
      (begin, end, pieces, classes, smoothed, data<T>(logits), weight, sums.data());
    });
    const std::vector<float> totals = weight_totals<T>(offsets, class_weight);
    torch::stable::parallel_for(0, rows, grain(kExponential * pieces.size()), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* x = data<T>(logits) + b * classes;
        const PieceSums* piece_sums = sums.data() + b * pieces.size();
        for (size_t first = 0, last; first < pieces.size(); first = last) {
          const int64_t task = pieces[first].task, size = ends[task + 1] - ends[task];
          float most = -std::numeric_limits<float>::infinity(), total = 0, weighted = 0;
          for (last = first; last < pieces.size() && pieces[last].task == task; ++last) {
            most = piece_sums[last].most <= most ? most : piece_sums[last].most;
            weighted += piece_sums[last].weighted;
          }
          const float base = finite_or_0(most);
          // A piece of minus infinities adds nothing.
          for (size_t p = first; p < last; ++p)
            if (piece_sums[p].total != 0)
              total += piece_sums[p].total * std::exp(finite_or_0(piece_sums[p].most) - base);
          // The vectors' exponential of infinity is finite; a NaN stays one.
          const float row_lse = std::isinf(most) && most > 0 ? total + most : base + std::log(total);
          const int64_t at = b * tasks + task, label = data<int64_t>(labels)[at];
          mutable_data<float>(lse)[at] = row_lse;
          if (label < 0) continue;
          const int64_t column = ends[task] + std::min(label, size - 1);
          row_weight[at] = weight == nullptr ? 1 : static_cast<float>(weight[column]);
          const float smoothing = static_cast<float>(label_smoothing), shift = finite_or_0(x[ends[task]]);
          row_loss[at] = (1 - smoothing) * row_weight[at] * (row_lse - static_cast<float>(x[column]));
          if (smoothed) row_loss[at] += smoothing * ((row_lse - shift) * totals[task] - weighted) / size;
          if (label >= size) row_loss[at] = std::numeric_limits<float>::quiet_NaN();
        }
      }
    });
  });
  torch::stable::parallel_for(0, tasks, grain(rows), [&](int64_t begin, int64_t end) {
    std::vector<double> losses(end - begin), weights(end - begin);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t k = begin; k < end; ++k) {
        losses[k - begin] += row_loss[b * tasks + k];
        weights[k - begin] += row_weight[b * tasks + k];
      }
    for (int64_t k = begin; k < end; ++k) {
      const float total = mutable_data<float>(weight_sum)[k] = static_cast<float>(weights[k - begin]);
      mutable_data<float>(loss)[k] = static_cast<float>(losses[k - begin]) * inverse(total);
    }
  });
  return {loss, lse, weight_sum};
}

Tensor multitask_cross_entropy_backward(const Tensor grad_loss, const Tensor logits, const Tensor labels,
                                        const Tensor offsets, const std::optional<Tensor> class_weight,
                                        double label_smoothing, const Tensor lse, const Tensor weight_sum) {
  const int64_t rows = labels.size(0), tasks = labels.size(1), classes = logits.size(1);
  Tensor grad_logits = new_tensor(logits, {rows, classes});
  const std::vector<ClassPiece> pieces = pieces_of(offsets);
  const int64_t count = pieces.size();
  const int32_t* ends = data<int32_t>(offsets);
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* weight = data<T>(class_weight);
    const std::vector<float> totals = weight_totals<T>(offsets, class_weight);
    torch::stable::parallel_for(0, rows * count, grain_of(logits, pieces), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ClassPiece& piece = pieces[i % count];
        const int64_t b = i / count, at = b * tasks + piece.task, label = data<int64_t>(labels)[at];
        const int64_t task_classes = ends[piece.task + 1] - piece.task_begin, size = piece.end - piece.begin;
        const float scale = data<float>(grad_loss)[piece.task] * inverse(data<float>(weight_sum)[piece.task]);
        T* grad = mutable_data<T>(grad_logits) + b * classes + piece.begin;
        if (label < 0 || label >= task_classes) {
          const float value = label < 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
          CMACLIP_DISPATCH(fill)(size, value * scale, grad);
          continue;
        }
        const float smoothing = static_cast<float>(label_smoothing), spread = smoothing / task_classes;
        const float label_weight = weight == nullptr ? 1 : static_cast<float>(weight[piece.task_begin + label]);
        CMACLIP_DISPATCH(gradient)
        (size, data<T>(logits) + b * classes + piece.begin, weight == nullptr ? weight : weight + piece.begin,
         data<float>(lse)[at], (1 - smoothing) * label_weight, spread, spread * totals[piece.task], scale,
         piece.task_begin + label - piece.begin, grad);
      }
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_multitask_cross_entropy_forward_cpp(Tensor logits, Tensor labels, Tensor offsets, Tensor? class_weight,"
      " float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_multitask_cross_entropy_backward_cpp(Tensor grad_loss, Tensor logits, Tensor labels, Tensor offsets,"
      " Tensor? class_weight, float label_smoothing, Tensor lse, Tensor weight_sum) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_multitask_cross_entropy_forward_cpp", TORCH_BOX(&multitask_cross_entropy_forward));
  m.impl("_multitask_cross_entropy_backward_cpp", TORCH_BOX(&multitask_cross_entropy_backward));
}

}  // namespace cmaclip
