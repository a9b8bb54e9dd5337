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

std::tuple<Tensor, Tensor> pack_tokens_forward(const Tensor text, const Tensor image, const Tensor text_lengths,
                                               const Tensor present, const std::optional<Tensor> type_embedding,
                                               const std::optional<int64_t> capacity) {
  kernels::Shape shape = {static_cast<int>(text.size(0)), static_cast<int>(text.size(1)),
                          static_cast<int>(image.size(1)), static_cast<int>(text.size(2)), 0};
  const int places = shape.length + shape.patches;
  const Launch launch(text);
  Tensor cu_seqlens = new_tensor(text_lengths, {shape.rows + 1});
  kernels::row_ends<<<1, kernels::kScanWarps * kWarp, 0, launch.stream()>>>(
      shape, data<int>(text_lengths), data<bool>(present), mutable_data<int>(cu_seqlens));
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
    // The kernel writes one row of the result for each place of a token.
    const int64_t written = int64_t{shape.rows} * places;
    if (written < shape.capacity)
      STD_CUDA_CHECK(cudaMemsetAsync(mutable_data<T>(packed) + written * shape.width, 0,
                                     (shape.capacity - written) * shape.width * sizeof(T), launch.stream()));
    if (written == 0) return;
    const auto start = [&](auto kernel) {
      const dim3 grid(shape.rows, ceil_div(places, kernels::kTokensPerBlock));
      kernel<<<grid, kernels::kThreads, 0, launch.stream()>>>(
          shape, data<T>(text), data<T>(image), data<int>(text_lengths), data<bool>(present), data<T>(type_embedding),
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

std::tuple<Tensor, Tensor, Tensor> pack_tokens_backward(const Tensor grad_packed, const Tensor text_lengths,
                                                        const Tensor present, const Tensor cu_seqlens, int64_t length,
                                                        int64_t patches) {
  const kernels::Shape shape = {static_cast<int>(present.size(0)), static_cast<int>(length), static_cast<int>(patches),
                                static_cast<int>(grad_packed.size(1)), grad_packed.size(0)};
  const int parts = kernels::sums_per_row(shape.length + shape.patches);
  const int64_t count = int64_t{shape.rows} * parts;
  const Launch launch(grad_packed);
  Tensor grad_text = new_tensor(grad_packed, {shape.rows, length, shape.width});
  Tensor grad_image = new_tensor(grad_packed, {shape.rows, patches, shape.width});
  Tensor grad_types = new_tensor(grad_packed, {2, shape.width});
  Tensor sums = new_tensor(grad_packed, {count, 2, shape.width}, ScalarType::Float);
  if (shape.width == 0) return {grad_text, grad_image, grad_types};
  for_dtype(grad_packed, "grad_packed", [&](auto zero) {
    using T = decltype(zero);
    const auto start = [&](auto kernel, int per_access) {
      const dim3 grid(shape.rows, ceil_div(shape.width, kWarp * per_access), parts);
      kernel<<<grid, kernels::kSumThreads, 0, launch.stream()>>>(
          shape, data<T>(grad_packed), data<int>(text_lengths), data<bool>(present), data<int>(cu_seqlens),
          mutable_data<T>(grad_text), mutable_data<T>(grad_image), mutable_data<float>(sums));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (count > 0) {
      if (wide_access<T>(shape.width, {data<T>(grad_packed)}))
        start(kernels::unpack<T, kPerAccess<T>>, kPerAccess<T>);
      else
        start(kernels::unpack<T, 1>, 1);
    }
    kernels::add_sums<T><<<ceil_div(2 * shape.width, kWarp), kernels::kScanWarps * kWarp, 0, launch.stream()>>>(
        2 * shape.width, count, data<float>(sums), mutable_data<T>(grad_types));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_text, grad_image, grad_types};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_pack_tokens_forward_cuda(Tensor text, Tensor image, Tensor text_lengths, Tensor present,"
      " Tensor? type_embedding, int? capacity) -> (Tensor, Tensor)");
  m.def(
      "_pack_tokens_backward_cuda(Tensor grad_packed, Tensor text_lengths, Tensor present, Tensor cu_seqlens,"
      " int length, int patches) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_pack_tokens_forward_cuda", TORCH_BOX(&pack_tokens_forward));
  m.impl("_pack_tokens_backward_cuda", TORCH_BOX(&pack_tokens_backward));
}

}  // namespace cmaclip
