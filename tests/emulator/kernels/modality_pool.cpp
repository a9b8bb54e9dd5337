// The kernels of modality_pool in all three types, 16 bytes at a time and one element at a time.
#include "cmaclip/modality_pool.cuh"
#include "kernel.h"

namespace pool = cmaclip::modality_pool;

#define KERNELS(suffix, T, Count, InShared)                                                \
  CMACLIP_EMULATE("forward_" suffix, pool::forward<T, Count, InShared>)                    \
  CMACLIP_EMULATE("backward_scores_" suffix, pool::backward_scores<T, Count, InShared>)    \
  CMACLIP_EMULATE("backward_embeddings_" suffix, pool::backward_embeddings<T, Count>)      \
  CMACLIP_EMULATE("backward_weight_" suffix, pool::backward_weight<T, Count>)

KERNELS("float32_wide", float, 4, true)
KERNELS("float32_narrow", float, 1, false)
KERNELS("float16_wide", __half, 8, true)
KERNELS("float16_narrow", __half, 1, false)
KERNELS("bfloat16_wide", __nv_bfloat16, 8, true)
KERNELS("bfloat16_narrow", __nv_bfloat16, 1, false)
