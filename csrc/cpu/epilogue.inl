// The kernels of the epilogues, compiled once for each instruction set.

// The activation and its derivative at `x`.
struct Activated {
  Vec value, slope;
};

// x times the normal distribution's cumulative probability, whose erfc is Abramowitz and Stegun's 7.1.26.
template <bool Slope>
inline Activated gelu(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec t = 1.0f / (1.0f + 0.3275911f * z);
  const Vec density = exponential(-0.5f * x * x);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * density;
  const Vec cumulative = x < 0.0f ? tail : 1.0f - tail;
  return {x * cumulative, Slope ? cumulative + 0.39894228f * x * density : Vec{}};
}

// x times the sigmoid of 1.702 x.
template <bool Slope>
inline Activated quick_gelu(Vec x) {
  const Vec sigmoid = 1.0f / (1.0f + exponential(-1.702f * x));
  return {x * sigmoid, Slope ? sigmoid + 1.702f * x * sigmoid * (1.0f - sigmoid) : Vec{}};
}

template <bool Slope>
inline Activated activate(bool quick, Vec x) {
  return quick ? quick_gelu<Slope>(x) : gelu<Slope>(x);
}

// Rows of `width` elements; `out` may be `x`.
void bias_gelu(int64_t rows, int64_t width, bool quick, const float* x, const float* bias, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = width - c;
      store(out + c, activate<false>(quick, load(x + c, count) + load(bias + c, count)).value, count);
    }
}

// Both the activation and the gradient of `x`; that may stand where `grad` stands.
void bias_gelu_gradient(int64_t rows, int64_t width, bool quick, const float* x, const float* bias, float* grad,
                        float* activated) {
  for (int64_t r = 0; r < rows; ++r, x += width, grad += width, activated += width)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = width - c;
      const Activated found = activate<true>(quick, load(x + c, count) + load(bias + c, count));
      store(activated + c, found.value, count);
      store(grad + c, load(grad + c, count) * found.slope, count);
    }
}

// `branch` becomes `x + branch + bias`.
void add_branch(int64_t rows, int64_t width, const float* x, const float* bias, float* branch) {
  for (int64_t r = 0; r < rows; ++r, x += width, branch += width)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = width - c;
      store(branch + c, load(x + c, count) + (load(branch + c, count) + load(bias + c, count)), count);
    }
}
