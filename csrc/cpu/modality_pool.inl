// The kernels of modality_pool, compiled once for each instruction set.

// Tasks whose weights are taken through all rows together, so that they stay in the cache.
constexpr int64_t kTaskBlock = 8;

template <typename T>
float dot(const T* a, const T* b, int64_t size) {
  Vec first{}, second{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= size; d += 2 * kLanes) {
    first += load(a + d) * load(b + d);
    second += load(a + d + kLanes) * load(b + d + kLanes);
  }
  for (; d < size; d += kLanes) first += load(a + d, size - d) * load(b + d, size - d);
  return sum(first + second);
}

template <typename T>
void axpy(float* total, float factor, const T* x, int64_t size) {
  for (int64_t d = 0; d < size; d += kLanes)
    store(total + d, load(total + d, size - d) + factor * load(x + d, size - d), size - d);
}

template <typename T>
void pool_rows(int64_t row_begin, int64_t row_end, int64_t tasks, int64_t modalities, int64_t shared, int64_t width,
               const T* embeddings, const T* weight, const bool* present, T* pooled, float* weights) {
  const int64_t weight_stride = shared ? 0 : width;
  const int64_t task_stride = shared ? width : modalities * width;
  for (int64_t block = 0; block < tasks; block += kTaskBlock) {
    const int64_t block_end = block + kTaskBlock < tasks ? block + kTaskBlock : tasks;
    for (int64_t b = row_begin; b < row_end; ++b) {
      const T* embedding = embeddings + b * modalities * width;
      const bool* exists = present + b * modalities;
      for (int64_t k = block; k < block_end; ++k) {
        float* row_weights = weights + (b * tasks + k) * modalities;
        float most = -INFINITY, total = 0;
        for (int64_t m = 0; m < modalities; ++m) {
          if (!exists[m]) continue;
          row_weights[m] = dot(embedding + m * width, weight + k * task_stride + m * weight_stride, width);
          // Written so that a NaN score becomes the maximum and shows in the result.
          most = row_weights[m] <= most ? most : row_weights[m];
        }
        for (int64_t m = 0; m < modalities; ++m) {
          row_weights[m] = exists[m] ? std::exp(row_weights[m] - most) : 0;
          total += row_weights[m];
        }
        for (int64_t m = 0; m < modalities; ++m)
          if (exists[m]) row_weights[m] /= total;
        T* out = pooled + (b * tasks + k) * width;
        for (int64_t d = 0; d < width; d += kLanes) {
          Vec mean{};
          for (int64_t m = 0; m < modalities; ++m)
            if (exists[m]) mean += row_weights[m] * load(embedding + m * width + d, width - d);
          store(out + d, mean, width - d);
        }
      }
    }
  }
}

// The gradients of the scores and of the embeddings. `total` has room for modalities * width.
template <typename T>
void pool_rows_backward(int64_t row_begin, int64_t row_end, int64_t tasks, int64_t modalities, int64_t shared,
                        int64_t width, const T* grad_pooled, const float* grad_weights, const T* embeddings,
                        const T* weight, const bool* present, const float* weights, float* grad_scores,
                        T* grad_embeddings, float* total) {
  const int64_t weight_stride = shared ? 0 : width;
  const int64_t task_stride = shared ? width : modalities * width;
  for (int64_t b = row_begin; b < row_end; ++b) {
    const T* embedding = embeddings + b * modalities * width;
    const bool* exists = present + b * modalities;
    std::memset(total, 0, modalities * width * sizeof(float));
    for (int64_t k = 0; k < tasks; ++k) {
      const T* grad = grad_pooled + (b * tasks + k) * width;
      const int64_t at = (b * tasks + k) * modalities;
      float mean = 0;
      for (int64_t m = 0; m < modalities; ++m) {
        grad_scores[at + m] = 0;
        if (!exists[m]) continue;
        grad_scores[at + m] = dot(grad, embedding + m * width, width);
        if (grad_weights != nullptr) grad_scores[at + m] += grad_weights[at + m];
        mean += weights[at + m] * grad_scores[at + m];
      }
      for (int64_t m = 0; m < modalities; ++m) {
        if (!exists[m]) continue;
        grad_scores[at + m] = weights[at + m] * (grad_scores[at + m] - mean);
        axpy(total + m * width, weights[at + m], grad, width);
        axpy(total + m * width, grad_scores[at + m], weight + k * task_stride + m * weight_stride, width);
      }
    }
    T* out = grad_embeddings + b * modalities * width;
    for (int64_t d = 0; d < modalities * width; d += kLanes)
      store(out + d, load(total + d, modalities * width - d), modalities * width - d);
  }
}

// The gradient of the tasks' weights, summed over the rows in their order. `total` has room for one task's.
template <typename T>
void pool_weight_backward(int64_t task_begin, int64_t task_end, int64_t rows, int64_t tasks, int64_t modalities,
                          int64_t shared, int64_t width, const T* embeddings, const bool* present,
                          const float* grad_scores, T* grad_weight, float* total) {
  const int64_t size = (shared ? 1 : modalities) * width;
  for (int64_t k = task_begin; k < task_end; ++k) {
    std::memset(total, 0, size * sizeof(float));
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t m = 0; m < modalities; ++m)
        if (present[b * modalities + m])
          axpy(total + (shared ? 0 : m * width), grad_scores[(b * tasks + k) * modalities + m],
               embeddings + (b * modalities + m) * width, width);
    for (int64_t d = 0; d < size; d += kLanes) store(grad_weight + k * size + d, load(total + d, size - d), size - d);
  }
}
