// Includes CMACLIP_KERNELS once for each instruction set, each time in a namespace of that name, and defines
// CMACLIP_DISPATCH(function)(...), which calls the one for the processor at hand.
// The vectors are the compiler's own (GCC and Clang), so `portable` works on every processor.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include <torch/headeronly/util/BFloat16.h>

#if defined(__x86_64__)

#include <immintrin.h>

#define CMACLIP_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define CMACLIP_BEGIN_TARGET(features) \
  CMACLIP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CMACLIP_END_TARGET CMACLIP_PRAGMA(clang attribute pop)
#else
#define CMACLIP_BEGIN_TARGET(features) CMACLIP_PRAGMA(GCC push_options) CMACLIP_PRAGMA(GCC target(features))
#define CMACLIP_END_TARGET CMACLIP_PRAGMA(GCC pop_options)
#endif

#define CMACLIP_LANES 16
#define CMACLIP_REGISTERS 32
CMACLIP_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace cmaclip::avx512 {
namespace {
#include "vec.inl"
#include CMACLIP_KERNELS
}  // namespace
}  // namespace cmaclip::avx512
CMACLIP_END_TARGET
#undef CMACLIP_LANES
#undef CMACLIP_REGISTERS

#define CMACLIP_LANES 8
#define CMACLIP_REGISTERS 16
CMACLIP_BEGIN_TARGET("avx2,fma")
namespace cmaclip::avx2 {
namespace {
#include "vec.inl"
#include CMACLIP_KERNELS
}  // namespace
}  // namespace cmaclip::avx2
CMACLIP_END_TARGET
#undef CMACLIP_LANES
#undef CMACLIP_REGISTERS

#endif

#define CMACLIP_LANES 4
#define CMACLIP_REGISTERS 16
namespace cmaclip::portable {
namespace {
#include "vec.inl"
#include CMACLIP_KERNELS
}  // namespace
}  // namespace cmaclip::portable
#undef CMACLIP_LANES
#undef CMACLIP_REGISTERS

#include "isa.h"

#if defined(__x86_64__)
#define CMACLIP_DISPATCH(function)                                      \
  [&](auto&&... arguments) {                                            \
    switch (::cmaclip::isa()) {                                         \
      case ::cmaclip::Isa::amx:                                         \
      case ::cmaclip::Isa::avx512:                                      \
        return ::cmaclip::avx512::function(arguments...);               \
      case ::cmaclip::Isa::avx2:                                        \
        return ::cmaclip::avx2::function(arguments...);                 \
      default:                                                          \
        return ::cmaclip::portable::function(arguments...);             \
    }                                                                   \
  }
#else
#define CMACLIP_DISPATCH(function) ::cmaclip::portable::function
#endif
