// Prepares the tensors of packed_attention and chooses the launches of their element type.

#include "packed_attention.h"

namespace cmaclip {
namespace {

namespace kernels = packed_attention;
using torch::stable::narrow;

int64_t per_access(const Tensor& tensor) {
  return 16 / tensor.element_size();
}

// [T, H, E] that can be read 16 bytes at a time: itself, or a copy with zeros up to `size` of the last dimension.
Tensor readable(const Tensor& tensor, int64_t size) {
  const int64_t step = per_access(tensor);
  const bool fits = tensor.size(2) == size && tensor.stride(0) % step == 0 && tensor.stride(1) % step == 0;
  if (fits && aligned(tensor.const_data_ptr())) return tensor;
  Tensor copy = torch::stable::new_zeros(tensor, {tensor.size(0), tensor.size(1), size});
  Tensor front = narrow(copy, 2, 0, tensor.size(2));
  torch::stable::copy_(front, tensor);
  return copy;
}

Tensor without_padding(Tensor tensor, int64_t size) {
  if (tensor.size(2) == size) return tensor;
  Tensor front = narrow(tensor, 2, 0, size);
  return torch::stable::contiguous(front);
}

struct Prepared {
  Tensor q, k, v, items;
  kernels::Arguments arguments;
};

Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ends_q, const Tensor& ends_k,
                 int64_t longest_q, int64_t longest_k, double scale, bool causal) {
  STD_TORCH_CHECK(q.size(2) <= kernels::kMostSize, "packed_attention takes head sizes of at most 128, not ", q.size(2));
  STD_TORCH_CHECK(q.size(1) <= 65535, "packed_attention takes at most 65535 heads on a GPU, not ", q.size(1));
  const int64_t step = per_access(q), size = (q.size(2) + step - 1) / step * step;
  const int rows = static_cast<int>(ends_q.size(0)) - 1;
  // A tile is at least as high as a warp's rows.
  const int limit = work_list::most_items(std::max(q.size(0), k.size(0)), rows, kernels::kRowsPerWarp);
  Prepared p{readable(q, size), readable(k, size), readable(v, size), new_tensor(ends_q, {limit, 2}), {}};
  const auto strides = [](const Tensor& x) { return kernels::Strides{x.stride(0), x.stride(1)}; };
  p.arguments = {{rows, static_cast<int>(q.size(1)), static_cast<int>(size), static_cast<int>(q.size(0)),
                  static_cast<int>(k.size(0)), causal, static_cast<float>(scale), strides(p.q), strides(p.k),
                  strides(p.v)},
                 data<int>(ends_q),
                 data<int>(ends_k),
                 longest_q,
                 longest_k,
                 p.q.const_data_ptr(),
                 p.k.const_data_ptr(),
                 p.v.const_data_ptr()};
  return p;
}

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor q, const Tensor k, const Tensor v,
                                                    const Tensor ends_q, const Tensor ends_k, int64_t longest_q,
                                                    int64_t longest_k, double scale, bool causal) {
  const Launch launch(q);
  Prepared p = prepare(q, k, v, ends_q, ends_k, longest_q, longest_k, scale, causal);
  Tensor out = new_tensor(q, {q.size(0), q.size(1), p.arguments.shape.size});
  Tensor lse = new_tensor(q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (q.size(0) > 0 && q.size(1) > 0) {
    for_dtype(q, "q", [&](auto zero) {
      using T = decltype(zero);
      kernels::launch_forward<T>(p.arguments, mutable_data<kernels::Item>(p.items), mutable_data<T>(out),
                                 mutable_data<float>(lse), launch.stream());
    });
  }
  return {without_padding(out, q.size(2)), lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor grad_out, const std::optional<Tensor> grad_lse, const Tensor q, const Tensor k, const Tensor v,
    const Tensor out, const Tensor lse, const Tensor ends_q, const Tensor ends_k, int64_t longest_q, int64_t longest_k,
    double scale, bool causal) {
  const Launch launch(q);
  Prepared p = prepare(q, k, v, ends_q, ends_k, longest_q, longest_k, scale, causal);
  const int64_t size = p.arguments.shape.size;
  const Tensor result = readable(out, size), grad = readable(grad_out, size);
  Tensor delta = new_tensor(lse, {q.size(1), q.size(0)});
  Tensor grad_q = new_tensor(q, {q.size(0), q.size(1), size});
  Tensor grad_k = new_tensor(k, {k.size(0), k.size(1), size});
  Tensor grad_v = new_tensor(v, {v.size(0), v.size(1), size});
  if (q.size(1) > 0) {
    for_dtype(q, "q", [&](auto zero) {
      using T = decltype(zero);
      kernels::launch_backward<T>(p.arguments, mutable_data<kernels::Item>(p.items), data<T>(result), data<float>(lse),
                                  data<T>(grad), data<float>(grad_lse), mutable_data<float>(delta),
                                  mutable_data<T>(grad_q), mutable_data<T>(grad_k), mutable_data<T>(grad_v),
                                  launch.stream());
    });
  }
  return {without_padding(grad_q, q.size(2)), without_padding(grad_k, q.size(2)), without_padding(grad_v, q.size(2))};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_packed_attention_forward_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " int max_seqlen_q, int max_seqlen_k, float scale, bool causal) -> (Tensor, Tensor)");
  m.def(
      "_packed_attention_backward_cuda(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float scale,"
      " bool causal) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CUDA, m) {
  m.impl("_packed_attention_forward_cuda", TORCH_BOX(&packed_attention_forward));
  m.impl("_packed_attention_backward_cuda", TORCH_BOX(&packed_attention_backward));
}

}  // namespace cmaclip
