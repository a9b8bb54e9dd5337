// The kernels of multitask_cross_entropy, compiled once for each instruction set.

// The first `count` elements, the other lanes `rest`.
template <typename T>
inline Vec load_or(const T* p, int64_t count, float rest) {
  if (count >= kLanes) return load(p);
  return lane_numbers() < static_cast<int32_t>(count) ? load(p, count) : splat(rest);
}

template <typename T>
float sum_of(const T* x, int64_t size) {
  Vec total{};
  for (int64_t c = 0; c < size; c += kLanes) total += load(x + c, size - c);
  return sum(total);
}

// The items from `begin` to `end`: piece i % pieces of row i / pieces. `weight` null: all 1.
template <typename T>
void reduce_pieces(int64_t begin, int64_t end, const std::vector<ClassPiece>& pieces, int64_t classes,
                   bool smoothed, const T* logits, const T* weight, PieceSums* sums) {
  const int64_t count = pieces.size();
  for (int64_t i = begin; i < end; ++i) {
    const ClassPiece& piece = pieces[i % count];
    const T* row = logits + i / count * classes;
    const T* x = row + piece.begin;
    const int64_t size = piece.end - piece.begin;
    Vec most = splat(-INFINITY);
    for (int64_t c = 0; c < size; c += kLanes) most = greater(load_or(x + c, size - c, -INFINITY), most);
    const float greatest_logit = greatest(most), base = finite_or_0(greatest_logit);
    Vec total{};
    for (int64_t c = 0; c < size; c += kLanes) total += exponential(load_or(x + c, size - c, -INFINITY) - base);
    sums[i] = {greatest_logit, sum(total), 0};
    if (!smoothed) continue;
    const float shift = finite_or_0(static_cast<float>(row[piece.task_begin]));
    Vec weighted{};
    for (int64_t c = 0; c < size; c += kLanes) {
      const Vec w = weight == nullptr ? splat(1) : load(weight + piece.begin + c, size - c);
      weighted += w * (load_or(x + c, size - c, shift) - shift);
    }
    sums[i].weighted = sum(weighted);
  }
}

// The gradient of one piece of a row: ((label_weight + spread_sum) * probability - spread * weight) * scale, where the
// label itself, at `label` of the piece or outside it, has label_weight taken away.
template <typename T>
void gradient(int64_t size, const T* x, const T* weight, float lse, float label_weight, float spread,
              float spread_sum, float scale, int64_t label, T* grad) {
  const float factor = label_weight + spread_sum;
  for (int64_t c = 0; c < size; c += kLanes) {
    const Vec w = weight == nullptr ? splat(1) : load(weight + c, size - c);
    const Vec probability = exponential(load(x + c, size - c) - lse);
    store(grad + c, (factor * probability - spread * w) * scale, size - c);
  }
  if (label < 0 || label >= size) return;
  const float w = weight == nullptr ? 1 : static_cast<float>(weight[label]);
  const float probability = std::exp(static_cast<float>(x[label]) - lse);
  grad[label] = static_cast<T>((factor * probability - spread * w - label_weight) * scale);
}

template <typename T>
void fill(int64_t size, float value, T* out) {
  for (int64_t c = 0; c < size; c += kLanes) store(out + c, splat(value), size - c);
}
