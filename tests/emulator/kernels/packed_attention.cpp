// The kernels of packed_attention for one element type and head size, given as -DELEMENT and -DSIZE.
#include "cmaclip/packed_attention.cuh"
#include "kernel.h"

namespace attention = cmaclip::packed_attention;

CMACLIP_EMULATE("forward", attention::forward<ELEMENT, SIZE>)
CMACLIP_EMULATE("backward_delta", attention::backward_delta<ELEMENT>)
CMACLIP_EMULATE("backward_q", attention::backward<ELEMENT, SIZE, false>)
CMACLIP_EMULATE("backward_kv", attention::backward<ELEMENT, SIZE, true>)
CMACLIP_EMULATE("forward_bytes", attention::forward_bytes<ELEMENT, SIZE>)
CMACLIP_EMULATE("backward_bytes", attention::backward_bytes<ELEMENT, SIZE>)
CMACLIP_EMULATE("plan", cmaclip::work_list::plan<attention::kTokensPerCost>)
CMACLIP_EMULATE("most_items", cmaclip::work_list::most_items)
CMACLIP_EMULATE("warps_for", attention::warps_for)
