// Launches the kernels of multitask_cross_entropy.

#include "launch.h"

#include "cmaclip/multitask_cross_entropy.cuh"

namespace cmaclip {
namespace {

namespace kernels = multitask_cross_entropy;

kernels::Shape shape_of(const Tensor& logits, const Tensor& labels, double label_smoothing) {
  return {labels.size(0), static_cast<int>(labels.size(1)), static_cast<int>(logits.size(1)),
          static_cast<float>(label_smoothing)};
}

// Starts one of three kernels, as `plan` has it: the grid goes with the kernel.
template <typename T, typename Kernel, typename... Arguments>
void start(const Launch& launch, int plan, const kernels::Shape& shape, bool weighted, Kernel tile, Kernel warps,
           Kernel blocks, Arguments... arguments) {
  switch (plan) {
    case kernels::kTile:
      tile<<<ceil_div(shape.rows, kernels::kTileRows<T>), kernels::kThreads,
             kernels::tile_bytes(shape.classes, weighted, sizeof(T)), launch.stream()>>>(shape, arguments...);
      break;
    case kernels::kWarpPerTask:
      warps<<<dim3(shape.rows, kernels::blocks_per_row(shape.tasks)), kernels::kThreads, 0, launch.stream()>>>(
          shape, arguments...);
      break;
    default:
      blocks<<<shape.rows * shape.tasks, kernels::kBlockThreads, 0, launch.stream()>>>(shape, arguments...);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> multitask_cross_entropy_forward(const Tensor logits, const Tensor labels,
                                                                   const Tensor offsets,
                                                                   const std::optional<Tensor> class_weight,
                                                                   double label_smoothing) {
  const kernels::Shape shape = shape_of(logits, labels, label_smoothing);
  Tensor loss = new_tensor(logits, {shape.tasks}, ScalarType::Float);
  Tensor lse = new_tensor(logits, {shape.rows, shape.tasks}, ScalarType::Float);
  Tensor weight_sum = new_tensor(logits, {shape.tasks}, ScalarType::Float);
  if (shape.tasks == 0) return {loss, lse, weight_sum};
  Tensor row_loss = new_tensor(logits, {shape.tasks, shape.rows}, ScalarType::Float);
  Tensor row_weight = new_tensor(logits, {shape.tasks, shape.rows}, ScalarType::Float);
  const Launch launch(logits);
  if (shape.rows > 0) {
    for_dtype(logits, "logits", [&](auto zero) {
      using T = decltype(zero);
      const bool all_aligned = aligned(data<T>(logits)) && aligned(data<T>(class_weight));
      const int plan = kernels::plan(shape.classes, shape.tasks, class_weight.has_value(), all_aligned, sizeof(T));
      start<T>(launch, plan, shape, class_weight.has_value(), kernels::forward_warps<T, true>,
               kernels::forward_warps<T, false>, kernels::forward_blocks<T>, data<T>(logits), data<int64_t>(labels),
               data<int>(offsets), data<T>(class_weight), mutable_data<float>(lse), mutable_data<float>(row_loss),
               mutable_data<float>(row_weight));
    });
  }
  kernels::add_rows<<<shape.tasks, kernels::kBlockThreads, 0, launch.stream()>>>(
      shape, data<float>(row_loss), data<float>(row_weight), mutable_data<float>(loss),
      mutable_data<float>(weight_sum));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, lse, weight_sum};
}

Tensor multitask_cross_entropy_backward(const Tensor grad_loss, const Tensor logits, const Tensor labels,
                                        const Tensor offsets, const std::optional<Tensor> class_weight,
                                        double label_smoothing, const Tensor lse, const Tensor weight_sum) {
  const kernels::Shape shape = shape_of(logits, labels, label_smoothing);
  Tensor grad_logits = new_tensor(logits, {shape.rows, shape.classes});
  if (shape.rows == 0 || shape.tasks == 0) return grad_logits;
  const Launch launch(logits);
  for_dtype(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    std::optional<Tensor> totals;
    if (class_weight && label_smoothing > 0) {
      totals = new_tensor(logits, {shape.tasks}, ScalarType::Float);
      kernels::add_class_weights<T><<<shape.tasks, kernels::kBlockThreads, 0, launch.stream()>>>(
          data<int>(offsets), data<T>(class_weight), mutable_data<float>(*totals));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const bool all_aligned = aligned(data<T>(logits)) && aligned(data<T>(class_weight));
    const int plan = kernels::plan(shape.classes, shape.tasks, class_weight.has_value(), all_aligned, sizeof(T));
    start<T>(launch, plan, shape, class_weight.has_value(), kernels::backward_warps<T, true>,
             kernels::backward_warps<T, false>, kernels::backward_blocks<T>, data<float>(grad_loss), data<T>(logits),
             data<int64_t>(labels), data<int>(offsets), data<T>(class_weight), data<float>(totals), data<float>(lse),
             data<float>(weight_sum), mutable_data<T>(grad_logits));
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_multitask_cross_entropy_forward_cuda(Tensor logits, Tensor labels, Tensor offsets, Tensor? class_weight,"
      " float label_smoothing) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_multitask_cross_entropy_backward_cuda(Tensor grad_loss, Tensor logits, Tensor labels, Tensor offsets,"
      " Tensor? class_weight, float label_smoothing, Tensor lse, Tensor weight_sum) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_multitask_cross_entropy_forward_cuda", TORCH_BOX(&multitask_cross_entropy_forward));
  m.impl("_multitask_cross_entropy_backward_cuda", TORCH_BOX(&multitask_cross_entropy_backward));
}

}  // namespace cmaclip
