// The kernels of pack_tokens, compiled once for each instruction set.

// Copies tokens, adding `type` to each unless it is null.
template <typename T>
void copy_tokens(int64_t tokens, int64_t width, const T* in, const T* type, T* out) {
  if (type == nullptr) {
    std::memcpy(out, in, tokens * width * sizeof(T));
    return;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t at = t * width + d;
      store(out + at, load(in + at, width - d) + load(type + d, width - d), width - d);
    }
}

// Adds tokens to `total` [D], four at a time.
template <typename T>
void add_tokens(int64_t tokens, int64_t width, const T* in, float* total) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    for (int64_t d = 0; d < width; d += kLanes) {
      const T* at = in + t * width + d;
      const int64_t count = width - d;
      const Vec first = load(at, count) + load(at + width, count);
      const Vec second = load(at + 2 * width, count) + load(at + 3 * width, count);
      store(total + d, load(total + d, count) + (first + second), count);
    }
  for (; t < tokens; ++t)
    for (int64_t d = 0; d < width; d += kLanes)
      store(total + d, load(total + d, width - d) + load(in + t * width + d, width - d), width - d);
}

// The packed tokens from `begin` to `end`, the first of them in `row`; 0 past the last row's.
template <typename T>
void pack_range(int64_t begin, int64_t end, int64_t row, int64_t rows, int64_t width, const T* text, const T* image,
                const T* types, const int32_t* starts, const int32_t* counts, const int32_t* cu_seqlens, T* packed) {
  const T* image_type = types == nullptr ? nullptr : types + width;
  for (; row < rows && begin < end; ++row) {
    const int64_t first = cu_seqlens[row], images = first + counts[2 * row];
    const int64_t stop = end < cu_seqlens[row + 1] ? end : cu_seqlens[row + 1];
    const int64_t text_stop = stop < images ? stop : images;
    if (begin < text_stop) {
      copy_tokens(text_stop - begin, width, text + (starts[2 * row] + begin - first) * width, types,
                  packed + begin * width);
      begin = text_stop;
    }
    if (begin < stop) {
      copy_tokens(stop - begin, width, image + (starts[2 * row + 1] + begin - images) * width, image_type,
                  packed + begin * width);
      begin = stop;
    }
  }
  if (begin < end) std::memset(static_cast<void*>(packed + begin * width), 0, (end - begin) * width * sizeof(T));
}

// The gradients of one modality's source tokens in blocks of `block`, and each block's sum [D]. A token's gradient is
// the sum over the rows that hold it, in their order.
template <typename T>
void unpack_blocks(int64_t block_begin, int64_t block_end, int64_t block, int64_t rows, int64_t modality,
                   int64_t tokens, int64_t width, const T* grad_packed, const int32_t* starts, const int32_t* counts,
                   const int32_t* cu_seqlens, T* grad, float* sums) {
  for (int64_t i = block_begin; i < block_end; ++i) {
    const int64_t begin = i * block, end = begin + block < tokens ? begin + block : tokens;
    float* total = sums + i * width;
    std::memset(total, 0, width * sizeof(float));
    const auto holds = [&](int64_t row, int64_t from, int64_t to) {
      const int64_t first = starts[2 * row + modality], last = first + counts[2 * row + modality];
      return first < last && first < to && last > from;
    };
    int64_t first_row = 0, last_row = rows;
    while (first_row < rows && !holds(first_row, begin, end)) ++first_row;
    while (last_row > first_row && !holds(last_row - 1, begin, end)) --last_row;
    // Runs of tokens that the same rows hold; what one row alone holds is copied.
    for (int64_t at = begin; at < end;) {
      int64_t holders = 0, holder = 0, stop = end;
      for (int64_t row = first_row; row < last_row; ++row) {
        if (!holds(row, at, stop)) continue;
        const int64_t first = starts[2 * row + modality], last = first + counts[2 * row + modality];
        if (first > at) {
          stop = first;
        } else {
          stop = last < stop ? last : stop;
          if (holders++ == 0) holder = row;
        }
      }
      const auto from = [&](int64_t row) {
        const int64_t before = modality == 0 ? 0 : counts[2 * row];
        return grad_packed + (cu_seqlens[row] + before + at - starts[2 * row + modality]) * width;
      };
      T* out = grad + at * width;
      if (holders == 0) {
        std::memset(static_cast<void*>(out), 0, (stop - at) * width * sizeof(T));
      } else if (holders == 1) {
        std::memcpy(static_cast<void*>(out), from(holder), (stop - at) * width * sizeof(T));
        add_tokens(stop - at, width, from(holder), total);
      } else {
        for (int64_t d = 0; d < width; d += kLanes)
          for (int64_t t = 0; t < stop - at; ++t) {
            Vec sum = load(from(holder) + t * width + d, width - d);
            for (int64_t row = holder + 1; row < last_row; ++row)
              if (holds(row, at, at + 1)) sum = sum + load(from(row) + t * width + d, width - d);
            store(out + t * width + d, sum, width - d);
            store(total + d, load(total + d, width - d) + sum, width - d);
          }
      }
      at = stop;
    }
  }
}

// The columns from `begin` to `end` of the blocks' sums, added in their order; the first block's is overwritten.
template <typename T>
void add_blocks(int64_t begin, int64_t end, int64_t blocks, int64_t columns, float* sums, T* result) {
  for (int64_t i = 1; i < blocks; ++i)
    for (int64_t d = begin; d < end; d += kLanes)
      store(sums + d, load(sums + d, end - d) + load(sums + i * columns + d, end - d), end - d);
  for (int64_t d = begin; d < end; d += kLanes) store(result + d, load(sums + d, end - d), end - d);
}
