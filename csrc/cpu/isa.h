// The instruction set that the CPU implementations use here: the best of the processor, or a lesser one that the
// environment variable CMACLIP_ISA names (amx, avx512, avx2, portable).

#pragma once

#include <cstdlib>
#include <string_view>

// What products in bfloat16 on the tile unit (AMX) take of compiler and system.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define CMACLIP_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define CMACLIP_TILES 0
#endif

namespace cmaclip {

// In the order of `INSTRUCTION_SETS` in cmaclip_fast/env.py.
enum class Isa { portable, avx2, avx512, amx };

// Whether the processor has tiles of bfloat16, with the vectors that prepare them, and the system lets us use them.
inline bool has_tiles() {
#if CMACLIP_TILES
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTiles = 1u << 24, kTilesOfBFloat16 = 1u << 22, kVectorsOfBFloat16 = 1u << 5;
  if ((d & kTiles) == 0 || (d & kTilesOfBFloat16) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorsOfBFloat16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline Isa isa() {
  static const Isa found = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("CMACLIP_ISA");
    const std::string_view most = asked == nullptr ? "amx" : asked;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && most == "amx" && has_tiles()) return Isa::amx;
    if (has_avx512 && (most == "amx" || most == "avx512")) return Isa::avx512;
    if (has_avx2 && most != "portable") return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return found;
}

}  // namespace cmaclip
