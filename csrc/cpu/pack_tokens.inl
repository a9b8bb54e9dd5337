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
void pack_range(int64_t begin, int64_t end, int64_t row, int64_t rows, int64_t length, int64_t patches, int64_t width,
                const T* text, const T* image, const T* types, const int32_t* texts, const int32_t* cu_seqlens,
                T* packed) {
  const T* image_type = types == nullptr ? nullptr : types + width;
  for (; row < rows && begin < end; ++row) {
    const int64_t start = cu_seqlens[row], images = start + texts[row];
    const int64_t stop = end < cu_seqlens[row + 1] ? end : cu_seqlens[row + 1];
    const int64_t text_stop = stop < images ? stop : images;
    if (begin < text_stop) {
      copy_tokens(text_stop - begin, width, text + (row * length + begin - start) * width, types,
                  packed + begin * width);
      begin = text_stop;
    }
    if (begin < stop) {
      copy_tokens(stop - begin, width, image + (row * patches + begin - images) * width, image_type,
                  packed + begin * width);
      begin = stop;
    }
  }
  if (begin < end) std::memset(static_cast<void*>(packed + begin * width), 0, (end - begin) * width * sizeof(T));
}

// Brings `tokens` gradients back, of which the first `kept` were packed, and adds them to `total`.
template <typename T>
void unpack_tokens(int64_t tokens, int64_t kept, int64_t width, const T* in, T* out, float* total) {
  kept = kept < 0 ? 0 : kept < tokens ? kept : tokens;
  std::memcpy(out, in, kept * width * sizeof(T));
  std::memset(static_cast<void*>(out + kept * width), 0, (tokens - kept) * width * sizeof(T));
  add_tokens(kept, width, in, total);
}

// The gradients of text and image in blocks of `block` of the B * (L + P) tokens, and each block's sums [2, D].
template <typename T>
void unpack_blocks(int64_t block_begin, int64_t block_end, int64_t block, int64_t rows, int64_t length,
                   int64_t patches, int64_t width, const T* grad_packed, const int32_t* texts,
                   const int32_t* cu_seqlens, T* grad_text, T* grad_image, float* sums) {
  const int64_t tokens = length + patches;
  for (int64_t i = block_begin; i < block_end; ++i) {
    float* total = sums + i * 2 * width;
    std::memset(total, 0, 2 * width * sizeof(float));
    const int64_t end = (i + 1) * block < rows * tokens ? (i + 1) * block : rows * tokens;
    for (int64_t at = i * block; at < end;) {
      const int64_t row = at / tokens, first = at - row * tokens;
      const int64_t last = end - row * tokens < tokens ? end - row * tokens : tokens;
      const T* grad = grad_packed + cu_seqlens[row] * width;
      const int64_t images = cu_seqlens[row + 1] - cu_seqlens[row] - texts[row];
      if (first < length) {
        const int64_t stop = last < length ? last : length;
        unpack_tokens(stop - first, texts[row] - first, width, grad + first * width,
                      grad_text + (row * length + first) * width, total);
      }
      if (last > length) {
        const int64_t start = first < length ? 0 : first - length;
        unpack_tokens(last - length - start, images - start, width, grad + (texts[row] + start) * width,
                      grad_image + (row * patches + start) * width, total + width);
      }
      at = row * tokens + last;
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
