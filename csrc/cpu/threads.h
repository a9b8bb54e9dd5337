// How work is shared among PyTorch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace cmaclip {

// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

inline int64_t grain(int64_t work_per_item) {
  return kGrain / (work_per_item + 1) + 1;
}

}  // namespace cmaclip
