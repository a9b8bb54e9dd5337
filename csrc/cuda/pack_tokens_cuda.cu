// Launches the kernels of pack_tokens.

#include "launch.h"

#include "cmaclip/pack_tokens.cuh"

namespace cmaclip {
namespace {

namespace kernels = pack_tokens;

// Whether tokens of this width can be read 16 bytes at a time; new tensors are aligned, views need not be.
template <typename T>
bool wide_access(int width, std::initializer_list<const void*> pointers) {
  bool fits = width % kPerAccess<T> == 0;
  for (const void* pointer : pointers) fits = fits && aligned(pointer);
  return fits;
}

std::tuple<Tensor, Tensor> pack_tokens_forward(const Tensor text, const Tensor image, const Tensor starts,
                                               const Tensor counts, const std::optional<Tensor> type_embedding,
                                               const std::optional<int64_t> capacity) {
  kernels::Shape shape = {static_cast<int>(starts.size(0)), static_cast<int>(text.size(0)),
                          static_cast<int>(image.size(0)), static_cast<int>(text.size(1)), 0};
  const Launch launch(text);
  Tensor cu_seqlens = new_tensor(starts, {shape.rows + 1});
  kernels::row_ends<<<1, kernels::kScanWarps * kWarp, 0, launch.stream()>>>(
      shape, data<int>(starts), data<int>(counts), mutable_data<int>(cu_seqlens));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (capacity) {
    shape.capacity = *capacity;
  } else {
    // The size of the result is known only on the device.
    int tokens = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&tokens, data<int>(cu_seqlens) + shape.rows, sizeof(tokens), cudaMemcpyDeviceToHost,
                                   launch.stream()));
    STD_CUDA_CHECK(cudaStreamSynchronize(launch.stream()));
    shape.capacity = tokens;
  }
  Tensor packed = new_tensor(text, {shape.capacity, shape.width});
  if (shape.capacity == 0 || shape.width == 0) return {packed, cu_seqlens};
  for_dtype(text, "text", [&](auto zero) {
    using T = decltype(zero);
    const auto start = [&](auto kernel) {
      kernel<<<ceil_div(shape.capacity, kernels::kTokensPerBlock), kernels::kThreads, 0, launch.stream()>>>(
          shape, data<T>(text), data<T>(image), data<int>(starts), data<int>(counts), data<T>(type_embedding),
          data<int>(cu_seqlens), mutable_data<T>(packed));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (wide_access<T>(shape.width, {data<T>(text), data<T>(image), data<T>(type_embedding)}))
      start(kernels::pack<T, kPerAccess<T>>);
    else
      start(kernels::pack<T, 1>);
  });
  return {packed, cu_seqlens};
}

std::tuple<Tensor, Tensor, Tensor> pack_tokens_backward(const Tensor grad_packed, const Tensor starts,
                                                        const Tensor counts, const Tensor cu_seqlens, int64_t texts,
                                                        int64_t images) {
  const kernels::Shape shape = {static_cast<int>(starts.size(0)), static_cast<int>(texts), static_cast<int>(images),
                                static_cast<int>(grad_packed.size(1)), grad_packed.size(0)};
  const Launch launch(grad_packed);
  Tensor grads[2] = {new_tensor(grad_packed, {texts, shape.width}), new_tensor(grad_packed, {images, shape.width})};
  Tensor grad_types = new_tensor(grad_packed, {2, shape.width});
  if (shape.width == 0) return {grads[0], grads[1], grad_types};
  for_dtype(grad_packed, "grad_packed", [&](auto zero) {
    using T = decltype(zero);
    for (int modality = 0; modality < 2; ++modality) {
      const int64_t count = ceil_div(grads[modality].size(0), kernels::kTokensPerSum);
      Tensor sums = new_tensor(grad_packed, {count, shape.width}, ScalarType::Float);
      const auto start = [&](auto kernel, int per_access) {
        const dim3 grid(count, ceil_div(shape.width, kWarp * per_access));
        kernel<<<grid, kernels::kSumThreads, 0, launch.stream()>>>(
            shape, modality, data<T>(grad_packed), data<int>(starts), data<int>(counts), data<int>(cu_seqlens),
            mutable_data<T>(grads[modality]), mutable_data<float>(sums));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (count > 0) {
        if (wide_access<T>(shape.width, {data<T>(grad_packed)}))
          start(kernels::unpack<T, kPerAccess<T>>, kPerAccess<T>);
        else
          start(kernels::unpack<T, 1>, 1);
      }
      kernels::add_sums<T><<<ceil_div(shape.width, kWarp), kernels::kScanWarps * kWarp, 0, launch.stream()>>>(
          shape.width, count, data<float>(sums), mutable_data<T>(grad_types) + modality * shape.width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {grads[0], grads[1], grad_types};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_pack_tokens_forward_cuda(Tensor text, Tensor image, Tensor starts, Tensor counts, Tensor? type_embedding,"
      " int? capacity) -> (Tensor, Tensor)");
  m.def(
      "_pack_tokens_backward_cuda(Tensor grad_packed, Tensor starts, Tensor counts, Tensor cu_seqlens, int texts,"
      " int images) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_pack_tokens_forward_cuda", TORCH_BOX(&pack_tokens_forward));
  m.impl("_pack_tokens_backward_cuda", TORCH_BOX(&pack_tokens_backward));
}

}  // namespace cmaclip
