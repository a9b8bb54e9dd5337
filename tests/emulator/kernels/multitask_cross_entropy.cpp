// The kernels of multitask_cross_entropy in all three types, and the choices of their launcher.
#include "cmaclip/multitask_cross_entropy.cuh"
#include "kernel.h"

namespace loss = cmaclip::multitask_cross_entropy;

#define KERNELS(suffix, T)                                                      \
  CMACLIP_EMULATE("forward_tile_" suffix, loss::forward_warps<T, true>)         \
  CMACLIP_EMULATE("forward_warps_" suffix, loss::forward_warps<T, false>)       \
  CMACLIP_EMULATE("forward_blocks_" suffix, loss::forward_blocks<T>)            \
  CMACLIP_EMULATE("add_class_weights_" suffix, loss::add_class_weights<T>)      \
  CMACLIP_EMULATE("backward_tile_" suffix, loss::backward_warps<T, true>)       \
  CMACLIP_EMULATE("backward_warps_" suffix, loss::backward_warps<T, false>)     \
  CMACLIP_EMULATE("backward_blocks_" suffix, loss::backward_blocks<T>)

KERNELS("float32", float)
KERNELS("float16", __half)
KERNELS("bfloat16", __nv_bfloat16)
CMACLIP_EMULATE("add_rows", loss::add_rows)
CMACLIP_EMULATE("plan", loss::plan)
CMACLIP_EMULATE("tile_bytes", loss::tile_bytes)
CMACLIP_EMULATE("blocks_per_row", loss::blocks_per_row)
