// The kernels of panel_linear, compiled once for each instruction set.

#include "tile.inl"

// Outputs of a panel: as many as a tile is wide.
constexpr int64_t kPanel = kTileColumns * kLanes;
// Inputs that are summed at once: about as many as there are such sums to be added, which keeps the error small.
constexpr int64_t kDepth = 64;

inline int64_t panel_width() {
  return kPanel;
}

// Panels begin:end of `weight` [width, depth]: [depth, kPanel] each, 0 past the last output.
void lay_panels(int64_t begin, int64_t end, int64_t width, int64_t depth, const float* weight, float* panels) {
  for (int64_t p = begin; p < end; ++p) {
    const float* const rows = weight + p * kPanel * depth;
    float* const panel = panels + p * kPanel * depth;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t c = 0; c < kPanel; ++c) panel[k * kPanel + c] = p * kPanel + c < width ? rows[c * depth + k] : 0;
  }
}

// The rows of one panel's outputs, `to` [rows, kPanel] with `stride`: while one part of the panel is multiplied, the next
// is fetched from memory, spread over the tiles.
template <int Lines>
void panel_product(int64_t rows, int64_t depth, const float* x, const float* panel, float* to, int64_t stride) {
  constexpr int kRows = tile_rows(kTileColumns);
  const int64_t tiles = (rows + kRows - 1) / kRows, parts = (depth + kDepth - 1) / kDepth;
  const int64_t step = (kPanel * 4 + tiles - 1) / tiles;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = depth * part / parts, last = depth * (part + 1) / parts;
    const char* const ahead = reinterpret_cast<const char*>(panel + last * kPanel);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = rows * t / tiles;
      multiply_rows<kRows, kTileColumns, false, Lines>(rows * (t + 1) / tiles - row, last - first,
                                                       x + row * depth + first, depth, panel + first * kPanel, kPanel,
                                                       to + row * stride, stride, part > 0, nullptr,
                                                       ahead + t * (last - first) * step, step);
    }
  }
}

// `out` [rows, width] in the columns of panels begin:end; `rest` has room for the rows of one panel.
void panel_linear(int64_t begin, int64_t end, int64_t rows, int64_t width, int64_t depth, const float* x,
                  const float* panels, const float* bias, float* rest, float* out) {
  const int64_t tiles = (rows + tile_rows(kTileColumns) - 1) / tile_rows(kTileColumns);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t column = p * kPanel, columns = width - column < kPanel ? width - column : kPanel;
    float* const to = columns < kPanel ? rest : out + column;
    const int64_t stride = columns < kPanel ? kPanel : width;
    const float* const panel = panels + column * depth;
    if (tiles * 64 >= kPanel * 4)
      panel_product<1>(rows, depth, x, panel, to, stride);
    else
      panel_product<kPanel * 4 / 64>(rows, depth, x, panel, to, stride);
    if (bias == nullptr && columns == kPanel) continue;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vec found = load(to + r * stride + c, columns - c);
        store(out + r * width + column + c, bias == nullptr ? found : found + load(bias + column + c, columns - c),
              columns - c);
      }
  }
}
