// The kernels of multitask_binary_cross_entropy in all three types.
#include "cmaclip/multitask_binary_cross_entropy.cuh"
#include "kernel.h"

namespace loss = cmaclip::multitask_binary_cross_entropy;

#define KERNELS(suffix, T)                                        \
  CMACLIP_EMULATE("sum_columns_" suffix, loss::sum_columns<T>)     \
  CMACLIP_EMULATE("scale_columns_" suffix, loss::scale_columns<T>) \
  CMACLIP_EMULATE("gradient_" suffix, loss::gradient<T>)

KERNELS("float32", float)
KERNELS("float16", __half)
KERNELS("bfloat16", __nv_bfloat16)
CMACLIP_EMULATE("add_parts", loss::add_parts)
