// packed_attention on the CPU: heads of rows, long ones in chunks, are shared among the threads by their cost.

#include "packed_attention.h"

#include "tensors.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#define CMACLIP_KERNELS "packed_attention.inl"
#include "targets.h"

#if CMACLIP_TILES
CMACLIP_BEGIN_TARGET(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")
namespace cmaclip::avx512::tiles {
namespace {
#include "packed_attention_tiles.inl"
}  // namespace
}  // namespace cmaclip::avx512::tiles
CMACLIP_END_TARGET
#endif

namespace cmaclip {
namespace {

// Below this many scores a second thread costs more than it brings.
constexpr int64_t kGrain = 4096;

// What an item costs beside its scores, as if it had so many more queries and keys.
constexpr int64_t kItemCost = 8;

// One head of a row, and the range of its queries (forward) or keys (backward) that is computed at once; or all heads of
// a row of few queries.
struct Item {
  int64_t row, head, begin, end;
  bool few = false;
};

// Items in order, with the sum of the costs before each.
struct Work {
  std::vector<Item> items;
  std::vector<int64_t> starts;
  int64_t cost = 0;

  void add(const Item& item, int64_t item_cost) {
    items.push_back(item);
    starts.push_back(cost);
    cost += item_cost;
  }

  // Calls run(index, next, buffer) for each item, `next` being the index of the one after it on the same thread, or the
  // same; threads get ranges of equal cost.
  template <typename F>
  void share(int64_t buffer_size, const F& run) const {
    torch::stable::parallel_for(0, cost, kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin();
      const int64_t last = std::lower_bound(starts.begin(), starts.end(), end) - starts.begin();
      if (first == last) return;
      constexpr std::align_val_t kAlignment{64};
      const auto release = [](float* p) { ::operator delete(p, kAlignment); };
      const std::unique_ptr<float, decltype(release)> buffer(
          static_cast<float*>(::operator new(buffer_size * sizeof(float), kAlignment)), release);
      for (int64_t i = first; i < last; ++i) run(i, i + 1 < last ? i + 1 : i, buffer.get());
    });
  }
};

// As CMACLIP_DISPATCH, of a function that has a twin on tiles for bfloat16.
#if CMACLIP_TILES
#define CMACLIP_DISPATCH_TILES(T, function)                                                            \
  [&](auto&&... arguments) {                                                                           \
    if constexpr (std::is_same_v<T, BFloat16>)                                                         \
      if (isa() == Isa::amx) return avx512::tiles::function(arguments...);                             \
    return CMACLIP_DISPATCH(function)(arguments...);                                                   \
  }
#else
#define CMACLIP_DISPATCH_TILES(T, function) CMACLIP_DISPATCH(function)
#endif

// The sizes and strides of a call.
struct Call {
  int64_t rows, heads, size, tokens_q, tokens_k;
  const int32_t *ends_q, *ends_k;
  float scale;
  bool causal;

  Call(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
       bool causal)
      : rows(cu_seqlens_q.size(0) - 1),
        heads(q.size(1)),
        size(q.size(2)),
        tokens_q(q.size(0)),
        tokens_k(k.size(0)),
        ends_q(data<int32_t>(cu_seqlens_q)),
        ends_k(data<int32_t>(cu_seqlens_k)),
        scale(static_cast<float>(scale)),
        causal(causal) {}

  int64_t queries(int64_t row) const { return ends_q[row + 1] - ends_q[row]; }
  int64_t keys(int64_t row) const { return ends_k[row + 1] - ends_k[row]; }
  int64_t offset(int64_t row) const { return causal ? keys(row) - queries(row) : kUnmasked; }

  // Where keys and values are read once and hardly computed with, they are best read in the order of their tokens.
  bool few(int64_t row) const {
    return queries(row) > 0 && queries(row) <= kFewQueries && keys(row) > 0 &&
           queries(row) * keys(row) * heads <= kFewScores;
  }

  template <typename T>
  Head<T> head(const Tensor& q, const Tensor& k, const Tensor& v, const Item& item) const {
    const auto at = [&](const Tensor& x, const int32_t* ends) {
      return data<T>(x) + ends[item.row] * x.stride(0) + item.head * x.stride(1);
    };
    return {queries(item.row), keys(item.row), size,         at(q, ends_q), at(k, ends_k), at(v, ends_k),
            q.stride(0),       k.stride(0),    v.stride(0),  heads * size,  scale,         offset(item.row)};
  }

  HeadStrides strides(const Tensor& q, const Tensor& k, const Tensor& v) const {
    return {heads, q.stride(1), k.stride(1), v.stride(1), tokens_q};
  }

  // The longest row of few queries.
  int64_t few_keys() const {
    int64_t most = 0;
    for (int64_t row = 0; row < rows; ++row)
      if (few(row)) most = std::max(most, keys(row));
    return most;
  }

  // Where a head of a row begins in a contiguous [T, H, E].
  int64_t at(const Item& item, const int32_t* ends) const { return (ends[item.row] * heads + item.head) * size; }
};

// Sequence ends within `tokens` tokens, of rows of at most `longest`.
void check_ends(const char* name, const Tensor& ends, int64_t tokens, int64_t longest) {
  STD_TORCH_CHECK(ends.dim() == 1 && ends.size(0) > 0 && ends.scalar_type() == ScalarType::Int && ends.is_contiguous(),
                  name, " must be contiguous int32 [B + 1]");
  const int32_t* const values = data<int32_t>(ends);
  const int64_t rows = ends.size(0) - 1;
  bool fit = values[0] == 0 && values[rows] <= tokens;
  for (int64_t row = 0; row < rows; ++row)
    fit &= values[row] <= values[row + 1] && int64_t{values[row + 1]} - values[row] <= longest;
  STD_TORCH_CHECK(fit, name, " must begin with 0, not decrease, and fit the tokens and the longest row");
}

// The messages for users are Python's, in ops/packed_attention.py; here nothing wrong may be read.
void check_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  for (const Tensor& x : {q, k, v}) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == q.size(1) && x.size(2) == q.size(2) && x.size(2) > 0 &&
                        x.scalar_type() == q.scalar_type(),
                    "q, k and v must be [T, H, E] of one dtype");
    STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1 || x.numel() == 0, "the last dimension must be contiguous");
  }
  STD_TORCH_CHECK(k.size(0) == v.size(0), "k and v must have as many tokens");
  check_ends("cu_seqlens_q", cu_seqlens_q, q.size(0), max_seqlen_q);
  check_ends("cu_seqlens_k", cu_seqlens_k, k.size(0), max_seqlen_k);
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), "q and k must have as many rows");
}

// Tokens past the last row get 0.
template <typename T>
void clear_rest(T* x, int64_t end, int64_t tokens, int64_t token_size) {
  std::memset(static_cast<void*>(x + end * token_size), 0, (tokens - end) * token_size * sizeof(T));
}

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor q, const Tensor k, const Tensor v,
                                                    const Tensor cu_seqlens_q, const Tensor cu_seqlens_k,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal) {
  check_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const Call call(q, k, cu_seqlens_q, cu_seqlens_k, scale, causal);
  Tensor out = new_tensor(q, {call.tokens_q, call.heads, call.size});
  Tensor lse = new_tensor(q, {call.heads, call.tokens_q}, ScalarType::Float);
  Work work;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.few(row)) {
      work.add({row, 0, 0, call.queries(row), true}, call.heads * kItemCost * (call.keys(row) + kItemCost));
      continue;
    }
    for (int64_t head = 0; head < call.heads; ++head)
      for (int64_t begin = 0; begin < call.queries(row); begin += kQueryChunk) {
        const int64_t end = std::min(begin + kQueryChunk, call.queries(row));
        const int64_t seen = visible_keys(end - 1, call.offset(row), call.keys(row));
        work.add({row, head, begin, end}, (end - begin + kItemCost) * (seen + kItemCost));
      }
  }
  for_dtype(q, "q", [&](auto zero) {
    using T = decltype(zero);
    T* const out_data = mutable_data<T>(out);
    float* const lse_data = mutable_data<float>(lse);
    const int64_t buffer_size =
        std::max(CMACLIP_DISPATCH_TILES(T, forward_buffer)(call.size),
                 CMACLIP_DISPATCH(few_buffer)(call.heads, call.size, call.few_keys()));
    work.share(buffer_size, [&](int64_t index, int64_t next, float* buffer) {
      const Item &item = work.items[index], &after = work.items[next];
      T* const item_out = out_data + call.at(item, call.ends_q);
      float* const item_lse = lse_data + item.head * call.tokens_q + call.ends_q[item.row];
      if (item.few) {
        CMACLIP_DISPATCH(few)
        (call.head<T>(q, k, v, item), call.strides(q, k, v), item_out, item_lse, buffer);
        return;
      }
      const Head<T> next_head = call.head<T>(q, k, v, after);
      Ahead ahead;
      ahead.add(item.end - item.begin, call.size,
                item_out + item.begin * call.heads * call.size, call.heads * call.size);
      if (next != index && !after.few) {
        ahead.add(after.end - after.begin, call.size, next_head.q + after.begin * next_head.q_stride,
                  next_head.q_stride);
        const int64_t keys = std::min(next_head.keys, kKeyBlock);
        ahead.add(keys, call.size, next_head.k, next_head.k_stride);
        ahead.add(keys, call.size, next_head.v, next_head.v_stride);
      }
      CMACLIP_DISPATCH_TILES(T, attention)
      (call.head<T>(q, k, v, item), item.begin, item.end, ahead, item_out, item_lse, buffer);
    });
    const int64_t end = call.ends_q[call.rows];
    clear_rest(out_data, end, call.tokens_q, call.heads * call.size);
    for (int64_t head = 0; head < call.heads; ++head)
      std::fill(lse_data + head * call.tokens_q + end, lse_data + (head + 1) * call.tokens_q, -INFINITY);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor grad_out, const std::optional<Tensor> grad_lse, const Tensor q, const Tensor k, const Tensor v,
    const Tensor out, const Tensor lse, const Tensor cu_seqlens_q, const Tensor cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double scale, bool causal) {
  const Call call(q, k, cu_seqlens_q, cu_seqlens_k, scale, causal);
  Tensor grad_q = new_tensor(q, {call.tokens_q, call.heads, call.size});
  Tensor grad_k = new_tensor(k, {call.tokens_k, call.heads, call.size});
  Tensor grad_v = new_tensor(v, {call.tokens_k, call.heads, call.size});
  // A row of several chunks of keys has a part of the queries' gradients for each, which are added up at the end.
  const int64_t chunk = key_chunk(call.size);
  Work work, adding;
  std::vector<int64_t> part_of_item;
  int64_t parts_size = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.few(row)) {
      work.add({row, 0, 0, call.keys(row), true}, call.heads * kItemCost * (call.keys(row) + kItemCost));
      part_of_item.push_back(-1);
      continue;
    }
    for (int64_t head = 0; head < call.heads; ++head) {
      const int64_t queries = call.queries(row);
      const Blocks blocks(std::max<int64_t>(call.keys(row), 1), chunk, 1);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const Item item{row, head, blocks.begin(b), std::min(blocks.end(b), call.keys(row))};
        const int64_t unseeing = std::clamp<int64_t>(item.begin - call.offset(row), 0, queries);
        work.add(item, (queries - unseeing + kItemCost) * (item.end - item.begin + kItemCost));
        part_of_item.push_back(blocks.count > 1 ? parts_size + b * queries * call.size : -1);
      }
      if (blocks.count == 1) continue;
      for (int64_t begin = 0; begin < queries; begin += kQueryChunk)
        adding.add({row, head, begin, std::min(begin + kQueryChunk, queries)}, blocks.count * kQueryChunk);
      parts_size += blocks.count * queries * call.size;
    }
  }
  Tensor parts = new_tensor(q, {parts_size}, ScalarType::Float);
  for_dtype(q, "q", [&](auto zero) {
    using T = decltype(zero);
    float* const parts_data = mutable_data<float>(parts);
    T* const grad_q_data = mutable_data<T>(grad_q);
    T* const grad_k_data = mutable_data<T>(grad_k);
    T* const grad_v_data = mutable_data<T>(grad_v);
    const float* const lse_grads = data<float>(grad_lse);
    const int64_t buffer_size =
        std::max(CMACLIP_DISPATCH_TILES(T, backward_buffer)(call.size),
                 CMACLIP_DISPATCH(few_buffer)(call.heads, call.size, call.few_keys()));
    work.share(buffer_size, [&](int64_t index, int64_t next, float* buffer) {
      const Item &item = work.items[index], &after = work.items[next];
      const int64_t at_q = call.at(item, call.ends_q), at_k = call.at(item, call.ends_k);
      const int64_t at_lse = item.head * call.tokens_q + call.ends_q[item.row];
      const T *const item_grad = data<T>(grad_out) + at_q, *const item_out = data<T>(out) + at_q;
      const float* const item_lse = data<float>(lse) + at_lse;
      const float* const item_lse_grad = lse_grads == nullptr ? nullptr : lse_grads + at_lse;
      const int64_t stride = call.heads * call.size;
      if (item.few) {
        CMACLIP_DISPATCH(few_backward)
        (call.head<T>(q, k, v, item), call.strides(q, k, v), item_grad, item_out, item_lse, item_lse_grad,
         grad_q_data + at_q, grad_k_data + at_k, grad_v_data + at_k, buffer);
        return;
      }
      const Head<T> next_head = call.head<T>(q, k, v, after);
      Ahead ahead;
      for (T* const grads : {grad_k_data, grad_v_data})
        ahead.add(item.end - item.begin, call.size, grads + at_k + item.begin * stride, stride);
      if (next != index && !after.few) {
        const int64_t keys = after.end - after.begin, queries = std::min(next_head.queries, kQueryBlock);
        const int64_t at_after = call.at(after, call.ends_q);
        ahead.add(keys, call.size, next_head.k + after.begin * next_head.k_stride, next_head.k_stride);
        ahead.add(keys, call.size, next_head.v + after.begin * next_head.v_stride, next_head.v_stride);
        ahead.add(queries, call.size, next_head.q, next_head.q_stride);
        ahead.add(queries, call.size, data<T>(grad_out) + at_after, stride);
        ahead.add(queries, call.size, data<T>(out) + at_after, stride);
      }
      const auto run = [&](auto* query_grads, int64_t query_stride) {
        CMACLIP_DISPATCH_TILES(T, attention_backward)
        (call.head<T>(q, k, v, item), item.begin, item.end, ahead, item_grad, item_out, item_lse, item_lse_grad,
         query_grads, query_stride, grad_k_data + at_k, grad_v_data + at_k, buffer);
      };
      if (part_of_item[index] < 0)
        run(grad_q_data + at_q, stride);
      else
        run(parts_data + part_of_item[index], call.size);
    });
    int64_t first_part = 0;
    std::vector<int64_t> first_parts;
    for (const Item& item : adding.items) {
      first_parts.push_back(first_part);
      const int64_t queries = call.queries(item.row);
      if (item.end == queries) first_part += Blocks(call.keys(item.row), chunk, 1).count * queries * call.size;
    }
    adding.share(1, [&](int64_t index, int64_t, float*) {
      const Item& item = adding.items[index];
      CMACLIP_DISPATCH(add_parts)
      (Blocks(call.keys(item.row), chunk, 1).count, item.end - item.begin, call.size,
       parts_data + first_parts[index] + item.begin * call.size, call.queries(item.row) * call.size,
       grad_q_data + call.at(item, call.ends_q) + item.begin * call.heads * call.size, call.heads * call.size);
    });
    clear_rest(grad_q_data, call.ends_q[call.rows], call.tokens_q, call.heads * call.size);
    clear_rest(grad_k_data, call.ends_k[call.rows], call.tokens_k, call.heads * call.size);
    clear_rest(grad_v_data, call.ends_k[call.rows], call.tokens_k, call.heads * call.size);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def(
      "_packed_attention_forward_cpp(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " int max_seqlen_q, int max_seqlen_k, float scale, bool causal) -> (Tensor, Tensor)");
  m.def(
      "_packed_attention_backward_cpp(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float scale,"
      " bool causal) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_packed_attention_forward_cpp", TORCH_BOX(&packed_attention_forward));
  m.impl("_packed_attention_backward_cpp", TORCH_BOX(&packed_attention_backward));
}

}  // namespace cmaclip
