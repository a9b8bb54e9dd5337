// What device code calls in the emulator. Everything here is implemented by the runtime; a call's return address is the
// source position that a report names, so callers are inlined into the kernels.
#pragma once

#include <cstdint>

#define CMACLIP_EMULATOR_API __attribute__((visibility("default"), noinline))

namespace cmaclip::emulator {

enum class Shuffle : int { index, up, down, butterfly };
enum class Reduction : int { add, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor };
enum class Atomic : int {
  add_integer,
  add_float,
  add_double,
  add_half,
  add_bfloat16,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor,
  exchange,
  compare_exchange,
};
enum class Mma : int { f16, bf16, tf32 };

CMACLIP_EMULATOR_API uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width);
CMACLIP_EMULATOR_API uint32_t ballot(uint32_t mask, bool predicate);
CMACLIP_EMULATOR_API uint32_t reduce(uint32_t mask, uint32_t value, Reduction kind);
CMACLIP_EMULATOR_API void sync_warp(uint32_t mask);
// The block barrier; returns the number of threads whose predicate holds.
CMACLIP_EMULATOR_API int sync_block(bool predicate);
// Returns the old value's bits.
CMACLIP_EMULATOR_API uint64_t atomic(void* address, int bytes, Atomic kind, uint64_t operand, uint64_t compare = 0);
CMACLIP_EMULATOR_API void* dynamic_shared();
CMACLIP_EMULATOR_API void cp_async(void* shared, const void* global, int bytes, bool valid);
CMACLIP_EMULATOR_API void cp_async_commit();
CMACLIP_EMULATOR_API void cp_async_wait(int pending);
CMACLIP_EMULATOR_API void ldmatrix(uint32_t* fragment, const void* row, int matrices, bool transposed);
CMACLIP_EMULATOR_API void mma(float* accumulator, const uint32_t* a, const uint32_t* b, Mma kind);
CMACLIP_EMULATOR_API uint32_t to_tf32(float value);
CMACLIP_EMULATOR_API float exp2_approx(float value);
CMACLIP_EMULATOR_API void trap();

}  // namespace cmaclip::emulator
