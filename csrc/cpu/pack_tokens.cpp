// pack_tokens on the CPU: packed tokens, and in the backward blocks of source tokens, are shared among the threads.

#include "tensors.h"
#include "threads.h"

#include <algorithm>
#include <vector>

#define CMACLIP_KERNELS "pack_tokens.inl"
#include "targets.h"

namespace cmaclip {
namespace {

// Source tokens whose gradients are summed together; fixed, so that the number of threads does not change the order.
constexpr int64_t kBlock = 128;

// What each row takes of text and image, `[B][2]`, kept within the sources.
struct Spans {
  std::vector<int32_t> starts, counts;

  Spans(const Tensor& given_starts, const Tensor& given_counts, int64_t texts, int64_t images)
      : starts(data<int32_t>(given_starts), data<int32_t>(given_starts) + given_starts.numel()),
        counts(data<int32_t>(given_counts), data<int32_t>(given_counts) + given_counts.numel()) {
    for (size_t i = 0; i < starts.size(); ++i) {
      const int64_t size = i % 2 == 0 ? texts : images;
      starts[i] = std::clamp<int64_t>(starts[i], 0, size);
      counts[i] = std::clamp<int64_t>(counts[i], 0, size - starts[i]);
    }
  }
};

std::tuple<Tensor, Tensor> pack_tokens_forward(const Tensor text, const Tensor image, const Tensor starts,
                                               const Tensor counts, const std::optional<Tensor> type_embedding,
                                               const std::optional<int64_t> capacity) {
  const int64_t rows = starts.size(0), width = text.size(1);
  const Spans spans(starts, counts, text.size(0), image.size(0));
  Tensor cu_seqlens = new_tensor(starts, {rows + 1});
  int32_t* ends = mutable_data<int32_t>(cu_seqlens);
  ends[0] = 0;
  for (int64_t b = 0; b < rows; ++b) ends[b + 1] = ends[b] + spans.counts[2 * b] + spans.counts[2 * b + 1];
  const int64_t size = capacity.value_or(ends[rows]);
  STD_TORCH_CHECK(size >= ends[rows], "capacity must be at least the number of tokens, ", ends[rows], ", but is ", size);
  Tensor packed = new_tensor(text, {size, width});
  for_dtype(text, "text", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, size, grain(width), [&](int64_t begin, int64_t end) {
      const int64_t row = std::upper_bound(ends + 1, ends + rows + 1, begin) - (ends + 1);
      CMACLIP_DISPATCH(pack_range)
      (begin, end, row, rows, width, data<T>(text), data<T>(image), data<T>(type_embedding), spans.starts.data(),
       spans.counts.data(), ends, mutable_data<T>(packed));
    });
  });
  return {packed, cu_seqlens};
}

std::tuple<Tensor, Tensor, Tensor> pack_tokens_backward(const Tensor grad_packed, const Tensor starts,
                                                        const Tensor counts, const Tensor cu_seqlens, int64_t texts,
                                                        int64_t images) {
  const int64_t rows = starts.size(0), width = grad_packed.size(1);
  const Spans spans(starts, counts, texts, images);
  Tensor grads[2] = {new_tensor(grad_packed, {texts, width}), new_tensor(grad_packed, {images, width})};
  Tensor grad_type = new_tensor(grad_packed, {2, width});
  for_dtype(grad_packed, "grad_packed", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t modality = 0; modality < 2; ++modality) {
      const int64_t tokens = grads[modality].size(0), blocks = (tokens + kBlock - 1) / kBlock;
      // At least one block, so that the sum of no tokens is 0.
      std::vector<float> sums(std::max<int64_t>(blocks, 1) * width);
      T* grad = mutable_data<T>(grads[modality]);
      T* type = mutable_data<T>(grad_type) + modality * width;
      torch::stable::parallel_for(0, blocks, grain(kBlock * width), [&](int64_t begin, int64_t end) {
        CMACLIP_DISPATCH(unpack_blocks)
        (begin, end, kBlock, rows, modality, tokens, width, data<T>(grad_packed), spans.starts.data(),
         spans.counts.data(), data<int32_t>(cu_seqlens), grad, sums.data());
      });
      torch::stable::parallel_for(0, width, grain(blocks), [&](int64_t begin, int64_t end) {
        CMACLIP_DISPATCH(add_blocks)(begin, end, blocks, width, sums.data(), type);
      });
    }
  });
  return {grads[0], grads[1], grad_type};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_pack_tokens_forward_cpp(Tensor text, Tensor image, Tensor starts, Tensor counts, Tensor? type_embedding,"
      " int? capacity) -> (Tensor, Tensor)");
  m.def(
      "_pack_tokens_backward_cpp(Tensor grad_packed, Tensor starts, Tensor counts, Tensor cu_seqlens, int texts,"
      " int images) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_pack_tokens_forward_cpp", TORCH_BOX(&pack_tokens_forward));
  m.impl("_pack_tokens_backward_cpp", TORCH_BOX(&pack_tokens_backward));
}

}  // namespace cmaclip
