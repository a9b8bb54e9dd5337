// Every PTX instruction that the kernels use, behind a named function (PTX ISA, chapter 9).
// Compiled by nvcc for sm_80 and later; with CMACLIP_EMULATOR defined, the host emulator stands in for the hardware.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef CMACLIP_EMULATOR
#include "emulator.h"
#endif

namespace cmaclip::isa {

// The block's dynamic shared memory, 128-byte aligned. Its size is the launch's third argument.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef CMACLIP_EMULATOR
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char cmaclip_dynamic_shared[];
  return reinterpret_cast<T*>(cmaclip_dynamic_shared);
#endif
}

#ifndef CMACLIP_EMULATOR
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Stores 4, 8 or 16 bytes to shared memory, aligned to their size, as one access (st.shared). Of an assignment nvcc may
// make several, which meet bank conflicts.
template <class Value>
__device__ __forceinline__ void store_shared(void* shared, const Value& value) {
  constexpr int kWords = sizeof(Value) / 4;
  static_assert(sizeof(Value) % 4 == 0 && (kWords == 1 || kWords == 2 || kWords == 4), "an access has 4, 8 or 16 bytes");
#ifdef CMACLIP_EMULATOR
  *static_cast<Value*>(shared) = value;
#else
  uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(Value));  // one access: a load of `value` may be said to be here
  const uint32_t address = shared_address(shared);
  if constexpr (kWords == 1)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory");
  else if constexpr (kWords == 2)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1]) : "memory");
  else
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
#endif
}

// Starts the copy of 16 bytes from global to shared memory, both 16-byte aligned (cp.async).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
#ifdef CMACLIP_EMULATOR
  emulator::cp_async(shared, global, 16, true);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#endif
}

// The same; where not `valid`, 16 zero bytes arrive and `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef CMACLIP_EMULATOR
  emulator::cp_async(shared, global, 16, valid);
#else
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
#endif
}

// Closes the group of the copies that this thread has started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef CMACLIP_EMULATOR
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are still under way. Other threads need a barrier besides.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CMACLIP_EMULATOR
  emulator::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Loads two 8x8 matrices of 16-bit elements; lanes 0-7 and 8-15 name their rows, 16 bytes each (ldmatrix).
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
#ifdef CMACLIP_EMULATOR
  emulator::ldmatrix(fragment, row, 2, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row) {
#ifdef CMACLIP_EMULATOR
  emulator::ldmatrix(fragment, row, 2, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Loads four 8x8 matrices; lanes 0-7, 8-15, 16-23 and 24-31 name their rows.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
#ifdef CMACLIP_EMULATOR
  emulator::ldmatrix(fragment, row, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
#ifdef CMACLIP_EMULATOR
  emulator::ldmatrix(fragment, row, 4, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// accumulator [16, 8] += a [16, 16] (row major) * b [16, 8] (column major), elements T = __half or __nv_bfloat16,
// float accumulation (mma.sync).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&accumulator)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "mma_m16n8k16 takes half or bfloat16");
#ifdef CMACLIP_EMULATOR
  emulator::mma(accumulator, a, b, std::is_same_v<T, __half> ? emulator::Mma::f16 : emulator::Mma::bf16);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The same for a [16, 8] and b [8, 8] in TF32, as given by to_tf32; lower bits are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&accumulator)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#ifdef CMACLIP_EMULATOR
  emulator::mma(accumulator, a, b, emulator::Mma::tf32);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Rounds to the nearest TF32 (8 bits of exponent, 10 of mantissa), ties away from zero (cvt.rna.tf32.f32).
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef CMACLIP_EMULATOR
  return emulator::to_tf32(value);
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

// 2 to the power of `value`, relative error about 2^-22, subnormal results flushed to zero (ex2.approx.ftz.f32).
__device__ __forceinline__ float exp2_approx(float value) {
#ifdef CMACLIP_EMULATOR
  return emulator::exp2_approx(value);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

}  // namespace cmaclip::isa
