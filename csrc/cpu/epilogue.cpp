// What stands between the matrix products of a transformer layer, in one pass each: a product's bias with the GELU that
// follows, and with the sum of a branch and its residual. Rows are shared among the threads.

#include "tensors.h"
#include "threads.h"

#define CMACLIP_KERNELS "epilogue.inl"
#include "targets.h"

namespace cmaclip {
namespace {

// What an element's activation costs, in multiplications.
constexpr int64_t kActivation = 16;

// `x [T, D]`, `bias [D]` -> GELU of `x + bias`, in `out`, which may be `x`.
void bias_gelu_forward(const Tensor x, const Tensor bias, bool quick, Tensor out) {
  const int64_t rows = x.size(0), width = x.size(1);
  check_floats("x", x, rows * width);
  check_floats("bias", bias, width);
  check_floats("out", out, rows * width);
  torch::stable::parallel_for(0, rows, grain(kActivation * width), [&](int64_t begin, int64_t end) {
    CMACLIP_DISPATCH(bias_gelu)
    (end - begin, width, quick, data<float>(x) + begin * width, data<float>(bias),
     mutable_data<float>(out) + begin * width);
  });
}

// `grad [T, D]` of the activation becomes that of `x`; the activation itself is computed again -> `[T, D]`.
Tensor bias_gelu_backward(Tensor grad, const Tensor x, const Tensor bias, bool quick) {
  const int64_t rows = x.size(0), width = x.size(1);
  check_floats("x", x, rows * width);
  check_floats("bias", bias, width);
  check_floats("grad", grad, rows * width);
  Tensor activated = new_tensor(x, {rows, width});
  torch::stable::parallel_for(0, rows, grain(kActivation * width), [&](int64_t begin, int64_t end) {
    CMACLIP_DISPATCH(bias_gelu_gradient)
    (end - begin, width, quick, data<float>(x) + begin * width, data<float>(bias),
     mutable_data<float>(grad) + begin * width, mutable_data<float>(activated) + begin * width);
  });
  return activated;
}

// `branch [T, D]` becomes `x + branch + bias`.
void add_branch_(Tensor branch, const Tensor x, const Tensor bias) {
  const int64_t rows = x.size(0), width = x.size(1);
  check_floats("x", x, rows * width);
  check_floats("bias", bias, width);
  check_floats("branch", branch, rows * width);
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    CMACLIP_DISPATCH(add_branch)
    (end - begin, width, data<float>(x) + begin * width, data<float>(bias),
     mutable_data<float>(branch) + begin * width);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def("_bias_gelu_forward_cpp(Tensor x, Tensor bias, bool quick, Tensor(a!) out) -> ()");
  m.def("_bias_gelu_backward_cpp(Tensor(a!) grad, Tensor x, Tensor bias, bool quick) -> Tensor");
  m.def("_add_branch_cpp(Tensor(a!) branch, Tensor x, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CPU, m) {
  m.impl("_bias_gelu_forward_cpp", TORCH_BOX(&bias_gelu_forward));
  m.impl("_bias_gelu_backward_cpp", TORCH_BOX(&bias_gelu_backward));
  m.impl("_add_branch_cpp", TORCH_BOX(&add_branch_));
}

}  // namespace cmaclip
