// The kernels of multitask_binary_cross_entropy, compiled once for each instruction set.

typedef int8_t ByteVec __attribute__((vector_size(CMACLIP_LANES)));

// The first `count` targets; in the other lanes they are unknown.
inline IntVec load_targets(const int8_t* p, int64_t count) {
  ByteVec bytes = ByteVec{} - 1;
  std::memcpy(&bytes, p, count < kLanes ? count : kLanes);
  return __builtin_convertvector(bytes, IntVec);
}

inline Vec absolute(Vec x) {
  return (Vec)((IntVec)x & 0x7fffffff);
}

// log(1 + z) for z from -0.5 to 1: twice the area tangent of z / (2 + z), by its series. Relative error at most 3e-7.
inline Vec log_of_1_and(Vec z) {
  const Vec u = z / (z + 2.0f), square = u * u;
  Vec p = splat(1.0f / 15);
  p = p * square + 1.0f / 13;
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  p = p * square + 1.0f;
  return 2 * u * p;
}

// The logarithm of a normal number.
inline Vec logarithm(Vec x) {
  // The exponent of the power of two that leaves 0.7 to 1.4 of x.
  const IntVec exponent = ((IntVec)x - 0x3f3504f3) >> 23;
  const Vec rest = (Vec)((IntVec)x - (exponent << 23));
  return __builtin_convertvector(exponent, Vec) * 0.693147181f + log_of_1_and(rest - 1.0f);
}

struct Terms {
  Vec loss, slope;
};

// The loss of some elements and its slope; undefined where the target is unknown.
inline Terms terms(Vec logit, IntVec target, const BinaryOptions& options) {
  const IntVec positive = target > 0;
  // Having a class is what not having it is at the opposite logit.
  const Vec x = positive ? -logit : logit;
  const Vec small = exponential(-absolute(x)), more = log_of_1_and(small), big = 1.0f / (1.0f + small);
  const IntVec likely = x >= 0;
  const Vec p = likely ? big : small * big, other = likely ? small * big : big;
  Vec loss = (likely ? x : Vec{}) + more, slope = p;
  if (options.gamma_positive > 0 || options.gamma_negative > 0) {
    const Vec gamma = positive ? splat(options.gamma_positive) : splat(options.gamma_negative);
    // An exponent of 0 counts for nothing at infinite logits too.
    const IntVec focused = gamma > 0;
    const Vec opposite = (likely ? Vec{} : -x) + more;
    const Vec focus = exponential(focused ? -gamma * opposite : Vec{});
    slope = focus * (p + (focused ? gamma * other * loss : Vec{}));
    loss = focus * loss;
  }
  if (options.margin > 0) {
    const IntVec counts = p > options.margin;
    const Vec q = counts ? p - options.margin : splat(0.25f), rest = other + options.margin;
    const Vec log_rest = q < 0.5f ? -log_of_1_and(-q) : -logarithm(rest);
    Vec focus = splat(1), of_focus{};
    if (options.gamma_negative > 0) {
      focus = exponential(options.gamma_negative * logarithm(q));
      of_focus = options.gamma_negative * log_rest / q;
    }
    const Vec shifted = p * other * focus * (of_focus + 1.0f / rest);
    loss = positive ? loss : (counts ? focus * log_rest : Vec{});
    slope = positive ? slope : (counts ? shifted : Vec{});
  }
  slope = positive ? -slope : slope;
  // A target above 1 must show, and so must a NaN, which comparisons do not.
  const IntVec sound = (logit == logit) & (target <= 1);
  const Vec nan = splat(__builtin_nanf(""));
  return {sound ? loss : nan, sound ? slope : nan};
}

// Of the columns from `begin` to `end`, the losses in the rows from `first` to `last`, added and weighted, and the
// weights. `weight` null: all 1.
template <typename T>
void sum_columns(int64_t first, int64_t last, int64_t begin, int64_t end, int64_t classes, const BinaryOptions& options,
                 const T* logits, const int8_t* targets, const T* weight, float* losses, float* weights) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t count = end - c;
    Vec loss{}, known{};
    for (int64_t b = first; b < last; ++b) {
      const IntVec target = load_targets(targets + b * classes + c, count);
      const Vec of_row = terms(load(logits + b * classes + c, count), target, options).loss;
      loss += target >= 0 ? of_row : Vec{};
      known += target >= 0 ? splat(1) : Vec{};
    }
    const Vec factor = weight == nullptr ? splat(1) : load(weight + c, count);
    store(losses + c, loss * factor, count);
    store(weights + c, known * factor, count);
  }
}

// The gradient of the columns from `begin` to `end` of a row; `scales` are the columns' factors.
template <typename T>
void binary_gradient(int64_t begin, int64_t end, const BinaryOptions& options, const T* logits, const int8_t* targets,
                     const float* scales, T* grad) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t count = end - c;
    const IntVec target = load_targets(targets + c, count);
    const Vec slope = terms(load(logits + c, count), target, options).slope;
    store(grad + c, (target >= 0 ? slope : Vec{}) * load(scales + c, count), count);
  }
}
