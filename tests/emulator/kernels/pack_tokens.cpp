// The kernels of pack_tokens in all three types, 16 bytes at a time and one element at a time.
#include "cmaclip/pack_tokens.cuh"
#include "kernel.h"

namespace tokens = cmaclip::pack_tokens;

#define KERNELS(suffix, T, Count)                              \
  CMACLIP_EMULATE("pack_" suffix, tokens::pack<T, Count>)      \
  CMACLIP_EMULATE("unpack_" suffix, tokens::unpack<T, Count>)

KERNELS("float32_wide", float, 4)
KERNELS("float32_narrow", float, 1)
KERNELS("float16_wide", __half, 8)
KERNELS("float16_narrow", __half, 1)
KERNELS("bfloat16_wide", __nv_bfloat16, 8)
KERNELS("bfloat16_narrow", __nv_bfloat16, 1)
CMACLIP_EMULATE("row_ends", tokens::row_ends)
CMACLIP_EMULATE("add_sums_float32", tokens::add_sums<float>)
CMACLIP_EMULATE("add_sums_float16", tokens::add_sums<__half>)
CMACLIP_EMULATE("add_sums_bfloat16", tokens::add_sums<__nv_bfloat16>)
