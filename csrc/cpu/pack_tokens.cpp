// pack_tokens on the CPU: packed tokens, and in the backward blocks of tokens, are shared among the threads.

#include "tensors.h"
#include "threads.h"

#include <algorithm>
#include <vector>

#define CMACLIP_KERNELS "pack_tokens.inl"
#include "targets.h"

namespace cmaclip {
namespace {

// Tokens whose gradients are summed together; fixed, so that the number of threads does not change the sum's order.
constexpr int64_t kBlock = 128;

// The text tokens of each row; where the text is absent, none.
std::vector<int32_t> text_counts(const Tensor& text_lengths, const Tensor& present, int64_t length) {
  std::vector<int32_t> counts(present.size(0));
  const int32_t* lengths = data<int32_t>(text_lengths);
  const bool* exists = data<bool>(present);
  for (size_t b = 0; b < counts.size(); ++b)
    counts[b] = exists[2 * b] ? std::clamp<int64_t>(lengths[b], 0, length) : 0;
  return counts;
}

std::tuple<Tensor, Tensor> pack_tokens_forward(const Tensor text, const Tensor image, const Tensor text_lengths,
                                               const Tensor present, const std::optional<Tensor> type_embedding,
                                               const std::optional<int64_t> capacity) {
  const int64_t rows = text.size(0), length = text.size(1), patches = image.size(1), width = text.size(2);
  const std::vector<int32_t> texts = text_counts(text_lengths, present, length);
  Tensor cu_seqlens = new_tensor(text_lengths, {rows + 1});
  int32_t* ends = mutable_data<int32_t>(cu_seqlens);
  ends[0] = 0;
  for (int64_t b = 0; b < rows; ++b)
    ends[b + 1] = ends[b] + texts[b] + (data<bool>(present)[2 * b + 1] ? patches : 0);
  const int64_t size = capacity.value_or(ends[rows]);
  STD_TORCH_CHECK(size >= ends[rows], "capacity must be at least the number of tokens, ", ends[rows], ", but is ", size);
  Tensor packed = new_tensor(text, {size, width});
  for_dtype(text, "text", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, size, grain(width), [&](int64_t begin, int64_t end) {
      const int64_t row = std::upper_bound(ends + 1, ends + rows + 1, begin) - (ends + 1);
      CMACLIP_DISPATCH(pack_range)
      (begin, end, row, rows, length, patches, width, data<T>(text), data<T>(image), data<T>(type_embedding),
       texts.data(), ends, mutable_data<T>(packed));
    });
  });
  return {packed, cu_seqlens};
}

std::tuple<Tensor, Tensor, Tensor> pack_tokens_backward(const Tensor grad_packed, const Tensor text_lengths,
                                                        const Tensor present, const Tensor cu_seqlens, int64_t length,
                                                        int64_t patches) {
  const int64_t rows = present.size(0), width = grad_packed.size(1);
  const int64_t blocks = (rows * (length + patches) + kBlock - 1) / kBlock;
  const std::vector<int32_t> texts = text_counts(text_lengths, present, length);
  Tensor grad_text = new_tensor(grad_packed, {rows, length, width});
  Tensor grad_image = new_tensor(grad_packed, {rows, patches, width});
  Tensor grad_type = new_tensor(grad_packed, {2, width});
  // At least one block, so that the sum of no tokens is 0.
  std::vector<float> sums(std::max<int64_t>(blocks, 1) * 2 * width);
  for_dtype(grad_packed, "grad_packed", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, blocks, grain(kBlock * width), [&](int64_t begin, int64_t end) {
      CMACLIP_DISPATCH(unpack_blocks)
      (begin, end, kBlock, rows, length, patches, width, data<T>(grad_packed), texts.data(), data<int32_t>(cu_seqlens),
       mutable_data<T>(grad_text), mutable_data<T>(grad_image), sums.data());
    });
    torch::stable::parallel_for(0, 2 * width, grain(blocks), [&](int64_t begin, int64_t end) {
      CMACLIP_DISPATCH(add_blocks)(begin, end, blocks, 2 * width, sums.data(), mutable_data<T>(grad_type));
    });
  });
  return {grad_text, grad_image, grad_type};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_pack_tokens_forward_cpp(Tensor text, Tensor image, Tensor text_lengths, Tensor present, Tensor? type_embedding,"
      " int? capacity) -> (Tensor, Tensor)");
  m.def(
      "_pack_tokens_backward_cpp(Tensor grad_packed, Tensor text_lengths, Tensor present, Tensor cu_seqlens,"
      " int length, int patches) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_pack_tokens_forward_cpp", TORCH_BOX(&pack_tokens_forward));
  m.impl("_pack_tokens_backward_cpp", TORCH_BOX(&pack_tokens_backward));
}

}  // namespace cmaclip
