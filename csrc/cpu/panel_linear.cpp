// Products of few rows with large weights: the weights are read from memory once, in the order in which they lie, and
// multiplied as fast as they come. Panels of outputs are shared among the threads.

#include "tensors.h"

#include <memory>

#define CMACLIP_KERNELS "panel_linear.inl"
#include "targets.h"

namespace cmaclip {
namespace {

// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kWork = 262144;

int64_t panels_of(int64_t width) {
  const int64_t one = CMACLIP_DISPATCH(panel_width)();
  return (width + one - 1) / one;
}

// `weight [N, D]` -> its panels, one after the other.
Tensor lay_panels(const Tensor weight) {
  const int64_t width = weight.size(0), depth = weight.size(1), panels = panels_of(width);
  check_floats("weight", weight, width * depth);
  Tensor laid = new_tensor(weight, {panels * CMACLIP_DISPATCH(panel_width)() * depth});
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    CMACLIP_DISPATCH(lay_panels)(begin, end, width, depth, data<float>(weight), mutable_data<float>(laid));
  });
  return laid;
}

// `x [T, D]`, the panels of `weight [N, D]`, `bias [N]` -> `x weight^T + bias`, `[T, N]`.
Tensor panel_linear(const Tensor x, const Tensor panels, const std::optional<Tensor> bias, int64_t width) {
  const int64_t rows = x.size(0), depth = x.size(1), count = panels_of(width);
  const int64_t panel = CMACLIP_DISPATCH(panel_width)();
  check_floats("x", x, rows * depth);
  STD_TORCH_CHECK(panels.numel() == count * panel * depth, "panels are not those of a weight of ", width, " by ", depth);
  if (bias) check_floats("bias", *bias, width);
  Tensor out = new_tensor(x, {rows, width});
  if (rows == 0) return out;
  const int64_t grain = kWork / (rows * depth * panel + 1) + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> rest(width % panel && end == count ? new float[rows * panel] : nullptr);
    CMACLIP_DISPATCH(panel_linear)
    (begin, end, rows, width, depth, data<float>(x), data<float>(panels), data<float>(bias), rest.get(),
     mutable_data<float>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def("_lay_panels_cpp(Tensor weight) -> Tensor");
  m.def("_panel_linear_cpp(Tensor x, Tensor panels, Tensor? bias, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_lay_panels_cpp", TORCH_BOX(&lay_panels));
  m.impl("_panel_linear_cpp", TORCH_BOX(&panel_linear));
}

}  // namespace cmaclip
