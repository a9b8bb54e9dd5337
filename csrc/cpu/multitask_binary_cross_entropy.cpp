// multitask_binary_cross_entropy on the CPU: pieces of some rows and columns are shared among the threads.

#include "tensors.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace cmaclip {

struct BinaryOptions {
  float gamma_positive, gamma_negative, margin;
};

}  // namespace cmaclip

#define CMACLIP_KERNELS "multitask_binary_cross_entropy.inl"
#include "targets.h"

namespace cmaclip {
namespace {

// Rows and columns of a piece.
constexpr int64_t kRows = 16, kColumns = 1024;
// What an element costs, in multiplications.
constexpr int64_t kElement = 32;

BinaryOptions options_of(double gamma_positive, double gamma_negative, double margin) {
  return {static_cast<float>(gamma_positive), static_cast<float>(gamma_negative), static_cast<float>(margin)};
}

// Calls `run` with the rows and the columns of each piece of [rows, classes], each from its first to past its last.
template <typename F>
void each_piece(int64_t rows, int64_t classes, const F& run) {
  const int64_t across = (classes + kColumns - 1) / kColumns, down = (rows + kRows - 1) / kRows;
  const int64_t work = kElement * std::min(rows, kRows) * std::min(classes, kColumns);
  torch::stable::parallel_for(0, across * down, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * kRows, column = i % across * kColumns;
      run(row, std::min(row + kRows, rows), column, std::min(column + kColumns, classes));
    }
  });
}

float inverse(float weight_sum) {
  return weight_sum > 0 ? 1 / weight_sum : 0;
}

std::tuple<Tensor, Tensor> multitask_binary_cross_entropy_forward(const Tensor logits, const Tensor targets,
                                                                  const Tensor offsets,
                                                                  const std::optional<Tensor> class_weight,
                                                                  double gamma_positive, double gamma_negative,
                                                                  double margin) {
  const int64_t rows = logits.size(0), classes = logits.size(1), tasks = offsets.size(0) - 1;
  const BinaryOptions options = options_of(gamma_positive, gamma_negative, margin);
  Tensor loss = new_tensor(logits, {tasks}, ScalarType::Float);
  Tensor weight_sum = new_tensor(logits, {tasks}, ScalarType::Float);
  const int64_t parts = (rows + kRows - 1) / kRows;
  std::vector<float> losses(parts * classes), weights(parts * classes);
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    each_piece(rows, classes, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
      const int64_t part = first / kRows * classes;
      CMACLIP_DISPATCH(sum_columns)
      (first, last, begin, end, classes, options, data<T>(logits), data<int8_t>(targets), data<T>(class_weight),
       losses.data() + part, weights.data() + part);
    });
  });
  const int32_t* ends = data<int32_t>(offsets);
  torch::stable::parallel_for(0, tasks, grain(parts * classes / std::max<int64_t>(tasks, 1)), [&](int64_t k, int64_t end) {
    for (; k < end; ++k) {
      double task_loss = 0, task_weight = 0;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t c = part * classes + ends[k]; c < part * classes + ends[k + 1]; ++c) {
          task_loss += losses[c];
          task_weight += weights[c];
        }
      const float total = mutable_data<float>(weight_sum)[k] = static_cast<float>(task_weight);
      mutable_data<float>(loss)[k] = static_cast<float>(task_loss) * inverse(total);
    }
  });
  return {loss, weight_sum};
}

Tensor multitask_binary_cross_entropy_backward(const Tensor grad_loss, const Tensor logits, const Tensor targets,
                                               const Tensor offsets, const std::optional<Tensor> class_weight,
                                               double gamma_positive, double gamma_negative, double margin,
                                               const Tensor weight_sum) {
  const int64_t rows = logits.size(0), classes = logits.size(1), tasks = offsets.size(0) - 1;
  const BinaryOptions options = options_of(gamma_positive, gamma_negative, margin);
  Tensor grad_logits = new_tensor(logits, {rows, classes});
  const int32_t* ends = data<int32_t>(offsets);
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* weight = data<T>(class_weight);
    std::vector<float> scales(classes);
    for (int64_t k = 0; k < tasks; ++k) {
      const float scale = data<float>(grad_loss)[k] * inverse(data<float>(weight_sum)[k]);
      for (int64_t c = ends[k]; c < ends[k + 1]; ++c)
        scales[c] = weight == nullptr ? scale : scale * static_cast<float>(weight[c]);
    }
    each_piece(rows, classes, [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
      for (int64_t at = first * classes; at < last * classes; at += classes)
        CMACLIP_DISPATCH(binary_gradient)
        (begin, end, options, data<T>(logits) + at, data<int8_t>(targets) + at, scales.data(),
         mutable_data<T>(grad_logits) + at);
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_multitask_binary_cross_entropy_forward_cpp(Tensor logits, Tensor targets, Tensor offsets, Tensor? class_weight,"
      " float gamma_positive, float gamma_negative, float margin) -> (Tensor, Tensor)");
  m.def(
      "_multitask_binary_cross_entropy_backward_cpp(Tensor grad_loss, Tensor logits, Tensor targets, Tensor offsets,"
      " Tensor? class_weight, float gamma_positive, float gamma_negative, float margin, Tensor weight_sum) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_multitask_binary_cross_entropy_forward_cpp", TORCH_BOX(&multitask_binary_cross_entropy_forward));
  m.impl("_multitask_binary_cross_entropy_backward_cpp", TORCH_BOX(&multitask_binary_cross_entropy_backward));
}

}  // namespace cmaclip
