// The instruction set that the CPU implementations use here: the best of the processor, or a lesser one that the
// environment variable CMACLIP_ISA names (avx512, avx2, portable).

#pragma once

#include <cstdlib>
#include <string_view>

namespace cmaclip {

// In the order of `INSTRUCTION_SETS` in cmaclip_fast/env.py.
enum class Isa { portable, avx2, avx512 };

inline Isa isa() {
  static const Isa found = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("CMACLIP_ISA");
    const std::string_view most = asked == nullptr ? "avx512" : asked;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && most == "avx512") return Isa::avx512;
    if (has_avx2 && most != "portable") return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return found;
}

}  // namespace cmaclip
