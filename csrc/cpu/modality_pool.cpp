// modality_pool on the CPU: rows, and for the weights' gradient tasks, are shared among the threads.

#include "tensors.h"
#include "threads.h"

#include <vector>

#define CMACLIP_KERNELS "modality_pool.inl"
#include "targets.h"

namespace cmaclip {
namespace {

std::tuple<Tensor, Tensor> modality_pool_forward(const Tensor embeddings, const Tensor weight, const Tensor present) {
  const int64_t rows = embeddings.size(0), modalities = embeddings.size(1), width = embeddings.size(2);
  const int64_t tasks = weight.size(0), shared = weight.size(1) == 1;
  Tensor pooled = new_tensor(embeddings, {rows, tasks, width});
  Tensor weights = new_tensor(embeddings, {rows, tasks, modalities}, ScalarType::Float);
  for_dtype(embeddings, "embeddings", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, rows, grain(tasks * modalities * width), [&](int64_t begin, int64_t end) {
      CMACLIP_DISPATCH(pool_rows)
      (begin, end, tasks, modalities, shared, width, data<T>(embeddings), data<T>(weight), data<bool>(present),
       mutable_data<T>(pooled), mutable_data<float>(weights));
    });
  });
  return {pooled, weights};
}

std::tuple<Tensor, Tensor> modality_pool_backward(const Tensor grad_pooled, const std::optional<Tensor> grad_weights,
                                                  const Tensor embeddings, const Tensor weight, const Tensor present,
                                                  const Tensor weights) {
  const int64_t rows = embeddings.size(0), modalities = embeddings.size(1), width = embeddings.size(2);
  const int64_t tasks = weight.size(0), shared = weight.size(1) == 1;
  Tensor grad_embeddings = new_tensor(embeddings, {rows, modalities, width});
  Tensor grad_weight = new_tensor(weight, {tasks, weight.size(1), width});
  std::vector<float> grad_scores(rows * tasks * modalities);
  for_dtype(embeddings, "embeddings", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, rows, grain(3 * tasks * modalities * width), [&](int64_t begin, int64_t end) {
      std::vector<float> total(modalities * width);
      CMACLIP_DISPATCH(pool_rows_backward)
      (begin, end, tasks, modalities, shared, width, data<T>(grad_pooled), data<float>(grad_weights),
       data<T>(embeddings), data<T>(weight), data<bool>(present), data<float>(weights), grad_scores.data(),
       mutable_data<T>(grad_embeddings), total.data());
    });
    torch::stable::parallel_for(0, tasks, grain(rows * modalities * width), [&](int64_t begin, int64_t end) {
      std::vector<float> total(modalities * width);
      CMACLIP_DISPATCH(pool_weight_backward)
      (begin, end, rows, tasks, modalities, shared, width, data<T>(embeddings), data<bool>(present),
       grad_scores.data(), mutable_data<T>(grad_weight), total.data());
    });
  });
  return {grad_embeddings, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def("_modality_pool_forward_cpp(Tensor embeddings, Tensor weight, Tensor present) -> (Tensor, Tensor)");
  m.def(
      "_modality_pool_backward_cpp(Tensor grad_pooled, Tensor? grad_weights, Tensor embeddings, Tensor weight,"
      " Tensor present, Tensor weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_modality_pool_forward_cpp", TORCH_BOX(&modality_pool_forward));
  m.impl("_modality_pool_backward_cpp", TORCH_BOX(&modality_pool_backward));
}

}  // namespace cmaclip
