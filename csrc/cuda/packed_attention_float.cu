#include "packed_attention_launch.h"

namespace cmaclip::packed_attention {
CMACLIP_INSTANTIATE(float);
}
