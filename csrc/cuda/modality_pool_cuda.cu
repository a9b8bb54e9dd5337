// Launches the kernels of modality_pool.

#include "launch.h"

#include "cmaclip/modality_pool.cuh"

namespace cmaclip {
namespace {

namespace kernels = modality_pool;

// What a block may have of shared memory without asking for more.
constexpr int64_t kSharedBytes = 48 * 1024;

kernels::Shape shape_of(const Tensor& embeddings, const Tensor& weight) {
  return {static_cast<int>(embeddings.size(0)), static_cast<int>(embeddings.size(1)), static_cast<int>(weight.size(0)),
          static_cast<int>(embeddings.size(2)), weight.size(1) == 1};
}

// Whether rows of this width can be read 16 bytes at a time; new tensors are aligned, views need not be.
template <typename T>
bool wide_access(const kernels::Shape& shape, std::initializer_list<const void*> pointers) {
  bool fits = shape.width % kPerAccess<T> == 0;
  for (const void* pointer : pointers) fits = fits && aligned(pointer);
  return fits;
}

std::tuple<Tensor, Tensor> modality_pool_forward(const Tensor embeddings, const Tensor weight, const Tensor present) {
  const kernels::Shape shape = shape_of(embeddings, weight);
  Tensor pooled = new_tensor(embeddings, {shape.rows, shape.tasks, shape.width});
  Tensor weights = new_tensor(embeddings, {shape.rows, shape.tasks, shape.modalities}, ScalarType::Float);
  if (shape.rows == 0 || shape.tasks == 0) return {pooled, weights};
  const Launch launch(embeddings);
  const dim3 grid(shape.rows, ceil_div(shape.tasks, kernels::kTasksPerBlock));
  for_dtype(embeddings, "embeddings", [&](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = int64_t{shape.modalities} * shape.width * sizeof(T);
    const auto start = [&](auto kernel, int64_t shared) {
      kernel<<<grid, kernels::kThreads, shared, launch.stream()>>>(shape, data<T>(embeddings), data<T>(weight),
                                                                   data<bool>(present), mutable_data<T>(pooled),
                                                                   mutable_data<float>(weights));
    };
    if (bytes <= kSharedBytes && wide_access<T>(shape, {data<T>(embeddings), data<T>(weight)}))
      start(kernels::forward<T, kPerAccess<T>, true>, bytes);
    else
      start(kernels::forward<T, 1, false>, 0);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {pooled, weights};
}

std::tuple<Tensor, Tensor> modality_pool_backward(const Tensor grad_pooled, const std::optional<Tensor> grad_weights,
                                                  const Tensor embeddings, const Tensor weight, const Tensor present,
                                                  const Tensor weights) {
  const kernels::Shape shape = shape_of(embeddings, weight);
  Tensor grad_embeddings = new_tensor(embeddings, {shape.rows, shape.modalities, shape.width});
  Tensor grad_weight = new_tensor(weight, {shape.tasks, weight.size(1), shape.width});
  Tensor grad_scores = new_tensor(weights, {shape.rows, shape.tasks, shape.modalities});
  const Launch launch(embeddings);
  for_dtype(embeddings, "embeddings", [&](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = int64_t{shape.modalities} * shape.width * sizeof(T);
    const bool wide = wide_access<T>(shape, {data<T>(grad_pooled), data<T>(embeddings), data<T>(weight)});
    const int count = wide ? kPerAccess<T> : 1;
    const auto scores = [&](auto kernel, int64_t shared) {
      const dim3 grid(shape.rows, ceil_div(shape.tasks, kernels::kTasksPerBlock));
      kernel<<<grid, kernels::kThreads, shared, launch.stream()>>>(
          shape, data<T>(grad_pooled), data<float>(grad_weights), data<T>(embeddings), data<bool>(present),
          data<float>(weights), mutable_data<float>(grad_scores));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    const auto rest = [&](auto embeddings_kernel, auto weight_kernel) {
      if (shape.rows > 0) {
        const dim3 grid(shape.rows, ceil_div(shape.width, kernels::kThreads * count));
        embeddings_kernel<<<grid, kernels::kThreads, 0, launch.stream()>>>(
            shape, data<T>(grad_pooled), data<T>(weight), data<bool>(present), data<float>(weights),
            data<float>(grad_scores), mutable_data<T>(grad_embeddings));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (shape.tasks > 0) {
        const dim3 grid(ceil_div(shape.width, kWarp * count), ceil_div(shape.tasks, kernels::kTasksPerWarp),
                        shape.shared ? 1 : shape.modalities);
        weight_kernel<<<grid, kernels::kWeightWarps * kWarp, 0, launch.stream()>>>(
            shape, data<T>(embeddings), data<bool>(present), data<float>(grad_scores), mutable_data<T>(grad_weight));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    };
    if (shape.rows > 0 && shape.tasks > 0) {
      if (wide && bytes <= kSharedBytes)
        scores(kernels::backward_scores<T, kPerAccess<T>, true>, bytes);
      else
        scores(kernels::backward_scores<T, 1, false>, 0);
    }
    if (shape.width > 0) {
      if (wide)
        rest(kernels::backward_embeddings<T, kPerAccess<T>>, kernels::backward_weight<T, kPerAccess<T>>);
      else
        rest(kernels::backward_embeddings<T, 1>, kernels::backward_weight<T, 1>);
    }
  });
  return {grad_embeddings, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def("_modality_pool_forward_cuda(Tensor embeddings, Tensor weight, Tensor present) -> (Tensor, Tensor)");
  m.def(
      "_modality_pool_backward_cuda(Tensor grad_pooled, Tensor? grad_weights, Tensor embeddings, Tensor weight,"
      " Tensor present, Tensor weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_modality_pool_forward_cuda", TORCH_BOX(&modality_pool_forward));
  m.impl("_modality_pool_backward_cuda", TORCH_BOX(&modality_pool_backward));
}

}  // namespace cmaclip
