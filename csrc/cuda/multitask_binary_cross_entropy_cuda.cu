// Launches the kernels of multitask_binary_cross_entropy.

#include "launch.h"

#include "cmaclip/multitask_binary_cross_entropy.cuh"

namespace cmaclip {
namespace {

namespace kernels = multitask_binary_cross_entropy;

kernels::Shape shape_of(const Tensor& logits, const Tensor& offsets, double gamma_positive, double gamma_negative,
                        double margin) {
  return {logits.size(0),
          static_cast<int>(offsets.size(0) - 1),
          static_cast<int>(logits.size(1)),
          static_cast<float>(gamma_positive),
          static_cast<float>(gamma_negative),
          static_cast<float>(margin)};
}

// A thread for each column of each part of the rows. The second dimension of a grid has at most 65,535 blocks.
dim3 grid_of(const kernels::Shape& shape) {
  const int parts = ceil_div(shape.rows, kernels::kRows);
  STD_TORCH_CHECK(parts <= 65535, "logits must have at most ", 65535 * kernels::kRows, " rows");
  return dim3(ceil_div(shape.classes, kernels::kThreads), parts);
}

std::tuple<Tensor, Tensor> multitask_binary_cross_entropy_forward(const Tensor logits, const Tensor targets,
                                                                  const Tensor offsets,
                                                                  const std::optional<Tensor> class_weight,
                                                                  double gamma_positive, double gamma_negative,
                                                                  double margin) {
  const kernels::Shape shape = shape_of(logits, offsets, gamma_positive, gamma_negative, margin);
  Tensor loss = new_tensor(logits, {shape.tasks}, ScalarType::Float);
  Tensor weight_sum = new_tensor(logits, {shape.tasks}, ScalarType::Float);
  if (shape.tasks == 0) return {loss, weight_sum};
  const dim3 grid = grid_of(shape);
  const int parts = static_cast<int>(grid.y);
  Tensor losses = new_tensor(logits, {parts, shape.classes}, ScalarType::Float);
  Tensor weights = new_tensor(logits, {parts, shape.classes}, ScalarType::Float);
  const Launch launch(logits);
  if (shape.rows > 0) {
    for_dtype(logits, "logits", [&](auto zero) {
      using T = decltype(zero);
      kernels::sum_columns<T><<<grid, kernels::kThreads, 0, launch.stream()>>>(
          shape, data<T>(logits), data<int8_t>(targets), data<T>(class_weight), mutable_data<float>(losses),
          mutable_data<float>(weights));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  kernels::add_parts<<<shape.tasks, kernels::kThreads, 0, launch.stream()>>>(
      parts, shape.classes, data<int>(offsets), data<float>(losses), data<float>(weights), mutable_data<float>(loss),
      mutable_data<float>(weight_sum));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, weight_sum};
}

Tensor multitask_binary_cross_entropy_backward(const Tensor grad_loss, const Tensor logits, const Tensor targets,
                                               const Tensor offsets, const std::optional<Tensor> class_weight,
                                               double gamma_positive, double gamma_negative, double margin,
                                               const Tensor weight_sum) {
  const kernels::Shape shape = shape_of(logits, offsets, gamma_positive, gamma_negative, margin);
  Tensor grad_logits = new_tensor(logits, {shape.rows, shape.classes});
  if (shape.rows == 0 || shape.tasks == 0) return grad_logits;
  Tensor scales = new_tensor(logits, {shape.classes}, ScalarType::Float);
  const dim3 grid = grid_of(shape);
  const Launch launch(logits);
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    kernels::scale_columns<T><<<shape.tasks, kernels::kThreads, 0, launch.stream()>>>(
        data<int>(offsets), data<float>(grad_loss), data<float>(weight_sum), data<T>(class_weight),
        mutable_data<float>(scales));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    kernels::gradient<T><<<grid, kernels::kThreads, 0, launch.stream()>>>(
        shape, data<T>(logits), data<int8_t>(targets), data<float>(scales), mutable_data<T>(grad_logits));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_multitask_binary_cross_entropy_forward_cuda(Tensor logits, Tensor targets, Tensor offsets, Tensor? class_weight,"
      " float gamma_positive, float gamma_negative, float margin) -> (Tensor, Tensor)");
  m.def(
      "_multitask_binary_cross_entropy_backward_cuda(Tensor grad_loss, Tensor logits, Tensor targets, Tensor offsets,"
      " Tensor? class_weight, float gamma_positive, float gamma_negative, float margin, Tensor weight_sum) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_multitask_binary_cross_entropy_forward_cuda", TORCH_BOX(&multitask_binary_cross_entropy_forward));
  m.impl("_multitask_binary_cross_entropy_backward_cuda", TORCH_BOX(&multitask_binary_cross_entropy_backward));
}

}  // namespace cmaclip
