// The kernels of packed_attention: every head size in half, and those that differ in layout in the other types.
#include "cmaclip/packed_attention.cuh"
#include "kernel.h"

namespace attention = cmaclip::packed_attention;

#define KERNELS(suffix, T, Size)                                                        \
  CMACLIP_EMULATE("forward_" suffix, attention::forward<T, Size>)                       \
  CMACLIP_EMULATE("backward_q_" suffix, attention::backward<T, Size, false>)            \
  CMACLIP_EMULATE("backward_kv_" suffix, attention::backward<T, Size, true>)            \
  CMACLIP_EMULATE("forward_bytes_" suffix, attention::forward_bytes<T, Size>)           \
  CMACLIP_EMULATE("backward_bytes_" suffix, attention::backward_bytes<T, Size>)

KERNELS("float16_32", __half, 32)
KERNELS("float16_64", __half, 64)
KERNELS("float16_80", __half, 80)
KERNELS("float16_96", __half, 96)
KERNELS("float16_128", __half, 128)
KERNELS("bfloat16_64", __nv_bfloat16, 64)
KERNELS("float32_32", float, 32)
KERNELS("float32_64", float, 64)
KERNELS("float32_80", float, 80)
KERNELS("float32_128", float, 128)
CMACLIP_EMULATE("forward_bytes_float32_96", attention::forward_bytes<float, 96>)
CMACLIP_EMULATE("backward_bytes_float32_96", attention::backward_bytes<float, 96>)
CMACLIP_EMULATE("backward_delta_float16", attention::backward_delta<__half>)
CMACLIP_EMULATE("backward_delta_bfloat16", attention::backward_delta<__nv_bfloat16>)
CMACLIP_EMULATE("backward_delta_float32", attention::backward_delta<float>)
CMACLIP_EMULATE("plan", cmaclip::work_list::plan)
CMACLIP_EMULATE("most_items", cmaclip::work_list::most_items)
CMACLIP_EMULATE("warps_for", attention::warps_for)
