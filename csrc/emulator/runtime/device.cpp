// The device functions of emulator.h, and the hooks that -fsanitize=thread puts before each access to memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "../device/rounding.h"
#include "machine.h"

namespace cmaclip::emulator {

namespace {

Machine& machine() { return Machine::instance(); }

#define CALLER machine().site(__builtin_return_address(0))

template <class T>
void for_lanes(const Collective& collective, T&& body) {
  for (int lane = 0; lane < 32; ++lane) {
    if (((collective.mask >> lane) & 1u) != 0) body(lane);
  }
}

struct ShuffleData {
  uint64_t value;
  Shuffle kind;
  int operand;
  int width;
  uint64_t result;
};

void finish_shuffle(const Collective& collective) {
  ++machine().totals.shuffles;
  for_lanes(collective, [&](int lane) {
    auto& own = *static_cast<ShuffleData*>(collective.data[lane]);
    const int first = lane & ~(own.width - 1);
    const int last = first + own.width - 1;
    int source = lane;
    switch (own.kind) {
      case Shuffle::index:
        source = first + (own.operand & (own.width - 1));
        break;
      case Shuffle::up:
        source = lane - own.operand < first ? lane : lane - own.operand;
        break;
      case Shuffle::down:
        source = lane + own.operand > last ? lane : lane + own.operand;
        break;
      case Shuffle::butterfly:
        source = (lane ^ own.operand) > last ? lane : lane ^ own.operand;
        break;
    }
    if (((collective.mask >> (source & 31)) & 1u) == 0) {
      machine().report("divergence",
                       std::string(collective.name) + ": lane " + std::to_string(lane) + " reads lane " +
                           std::to_string(source) + ", which is not in the mask",
                       collective.site);
      source = lane;
    }
    own.result = static_cast<ShuffleData*>(collective.data[source & 31])->value;
  });
}

struct VoteData {
  bool predicate;
  uint32_t result;
};

void finish_warp_barrier(const Collective&) { ++machine().totals.warp_barriers; }

void finish_ballot(const Collective& collective) {
  ++machine().totals.votes;
  uint32_t ballot = 0;
  for_lanes(collective, [&](int lane) {
    if (static_cast<VoteData*>(collective.data[lane])->predicate) ballot |= 1u << lane;
  });
  for_lanes(collective, [&](int lane) { static_cast<VoteData*>(collective.data[lane])->result = ballot; });
}

struct ReduceData {
  uint32_t value;
  Reduction kind;
};

uint32_t combine(uint32_t a, uint32_t b, Reduction kind) {
  const int32_t signed_a = static_cast<int32_t>(a);
  const int32_t signed_b = static_cast<int32_t>(b);
  switch (kind) {
    case Reduction::add:
      return a + b;
    case Reduction::min_signed:
      return static_cast<uint32_t>(std::min(signed_a, signed_b));
    case Reduction::max_signed:
      return static_cast<uint32_t>(std::max(signed_a, signed_b));
    case Reduction::min_unsigned:
      return std::min(a, b);
    case Reduction::max_unsigned:
      return std::max(a, b);
    case Reduction::bit_and:
      return a & b;
    case Reduction::bit_or:
      return a | b;
    case Reduction::bit_xor:
      return a ^ b;
  }
  return 0;
}

void finish_reduce(const Collective& collective) {
  ++machine().totals.shuffles;
  bool first = true;
  uint32_t total = 0;
  for_lanes(collective, [&](int lane) {
    const auto& own = *static_cast<ReduceData*>(collective.data[lane]);
    total = first ? own.value : combine(total, own.value, own.kind);
    first = false;
  });
  for_lanes(collective, [&](int lane) { static_cast<ReduceData*>(collective.data[lane])->value = total; });
}

struct MatrixLoad {
  uint32_t* fragment;
  const char* row;
  int matrices;
  bool transposed;
};

// PTX ISA, ldmatrix: lane 8 i + r names row r of matrix i; lane l receives elements 2 (l % 4) and the next of row l / 4.
void finish_ldmatrix(const Collective& collective) {
  ++machine().totals.ldmatrix;
  const auto& first = *static_cast<MatrixLoad*>(collective.data[0]);
  const int thread = machine().current_thread() & ~31;
  std::array<uintptr_t, 32> rows{};
  for (int lane = 0; lane < 8 * first.matrices; ++lane) {
    rows[lane] = reinterpret_cast<uintptr_t>(static_cast<MatrixLoad*>(collective.data[lane])->row);
    machine().read_row(rows[lane], collective.site, thread + lane);
  }
  machine().count_row_phases(rows, 8 * first.matrices, collective.site);
  for (int matrix = 0; matrix < first.matrices; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], reinterpret_cast<const void*>(rows[8 * matrix + row]), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4;
      const int minor = 2 * (lane % 4);
      const uint32_t low = first.transposed ? elements[minor][major] : elements[major][minor];
      const uint32_t high = first.transposed ? elements[minor + 1][major] : elements[major][minor + 1];
      static_cast<MatrixLoad*>(collective.data[lane])->fragment[matrix] = low | (high << 16);
    }
  }
}

struct MmaData {
  float* accumulator;
  const uint32_t* a;
  const uint32_t* b;
  Mma kind;
};

float element(uint32_t pair, int half, Mma kind) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  return kind == Mma::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// A float accumulator plus products, without rounding, as tensor cores were found to add them (Fasi et al., "Numerical
// behavior of NVIDIA tensor cores", 2021): all terms are cut toward zero beside the largest of them, and so is their sum
// to a float. That terms keep one bit more than a float has is a choice; GPUs differ in it.
float truncated_sum(float accumulator, const double* products, int count) {
  double exact = accumulator, most = std::fabs(exact);
  for (int k = 0; k < count; ++k) {
    exact += products[k];
    most = std::max(most, std::fabs(products[k]));
  }
  if (most == 0 || !std::isfinite(exact)) return static_cast<float>(exact);
  const auto cut = [](double value, int bits, double beside) {
    const int last = std::ilogb(beside) - bits + 1;
    return std::ldexp(std::trunc(std::ldexp(value, -last)), last);
  };
  double sum = cut(accumulator, 25, most);
  for (int k = 0; k < count; ++k) sum += cut(products[k], 25, most);
  return sum == 0 ? 0 : static_cast<float>(cut(sum, 24, sum));
}

// PTX ISA, matrix fragments for mma.m16n8k16 (16-bit) and mma.m16n8k8 (tf32), with group = lane / 4, member = lane % 4.
// Products are exact. Their sum is rounded to float once, which no order of the hardware's own sums beats; or, if
// CMACLIP_EMULATOR_MMA=truncate asks for it, cut as tensor cores do (`truncated_sum`).
void finish_mma(const Collective& collective) {
  const Mma kind = static_cast<MmaData*>(collective.data[0])->kind;
  Totals& totals = machine().totals;
  ++(kind == Mma::f16 ? totals.mma_f16 : kind == Mma::bf16 ? totals.mma_bf16 : totals.mma_tf32);
  const int depth = kind == Mma::tf32 ? 8 : 16;
  float a[16][16];
  double b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MmaData*>(collective.data[lane]);
    const int group = lane / 4;
    const int member = lane % 4;
    if (kind == Mma::tf32) {
      const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
      for (int i = 0; i < 4; ++i) a[group + 8 * (i & 1)][member + 4 * (i >> 1)] = tf32(own.a[i]);
      for (int i = 0; i < 2; ++i) b[member + 4 * i][group] = tf32(own.b[i]);
    } else {
      for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          a[group + 8 * (i & 1)][2 * member + half + 8 * (i >> 1)] = element(own.a[i], half, kind);
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) b[2 * member + half + 8 * i][group] = element(own.b[i], half, kind);
      }
    }
  }
  double sums[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) sums[row][column] = 0.0;
    for (int k = 0; k < depth; ++k) {
      const double left = a[row][k];
      for (int column = 0; column < 8; ++column) sums[row][column] += left * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* accumulator = static_cast<MmaData*>(collective.data[lane])->accumulator;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      if (machine().mma_truncates) {
        double products[16];
        for (int k = 0; k < depth; ++k) products[k] = static_cast<double>(a[row][k]) * b[k][column];
        for (int k = 0; k < depth; k += depth / 2)
          accumulator[i] = truncated_sum(accumulator[i], products + k, depth / 2);
        continue;
      }
      accumulator[i] = static_cast<float>(static_cast<double>(accumulator[i]) + sums[row][column]);
    }
  }
}

uint64_t atomic_result(uint64_t old, Atomic kind, uint64_t operand, uint64_t compare) {
  const auto as_float = [](uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); };
  const int32_t signed_old = static_cast<int32_t>(old);
  const int32_t signed_operand = static_cast<int32_t>(operand);
  switch (kind) {
    case Atomic::add_integer:
      return old + operand;
    case Atomic::add_float:
      return std::bit_cast<uint32_t>(as_float(old) + as_float(operand));
    case Atomic::add_double:
      return std::bit_cast<uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(operand));
    case Atomic::add_half:
      return float_to_half(half_to_float(static_cast<uint16_t>(old)) + half_to_float(static_cast<uint16_t>(operand)));
    case Atomic::add_bfloat16:
      return float_to_bfloat16(bfloat16_to_float(static_cast<uint16_t>(old)) +
                               bfloat16_to_float(static_cast<uint16_t>(operand)));
    case Atomic::min_signed:
      return static_cast<uint32_t>(std::min(signed_old, signed_operand));
    case Atomic::max_signed:
      return static_cast<uint32_t>(std::max(signed_old, signed_operand));
    case Atomic::min_unsigned:
      return std::min(old, operand);
    case Atomic::max_unsigned:
      return std::max(old, operand);
    case Atomic::bit_and:
      return old & operand;
    case Atomic::bit_or:
      return old | operand;
    case Atomic::bit_xor:
      return old ^ operand;
    case Atomic::exchange:
      return operand;
    case Atomic::compare_exchange:
      return old == compare ? operand : old;
  }
  return old;
}

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int operand, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const uint32_t site = CALLER;
  const char* name = names[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    machine().fail("bad argument", std::string(name) + " with width " + std::to_string(width), site);
  }
  ShuffleData data{value, kind, operand, width, 0};
  machine().collective(name, mask, site, &data, false, &finish_shuffle);
  return data.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  VoteData data{predicate, 0};
  machine().collective("vote", mask, CALLER, &data, false, &finish_ballot);
  return data.result;
}

uint32_t reduce(uint32_t mask, uint32_t value, Reduction kind) {
  ReduceData data{value, kind};
  machine().collective("__reduce_sync", mask, CALLER, &data, false, &finish_reduce);
  return data.value;
}

void sync_warp(uint32_t mask) {
  machine().collective("__syncwarp", mask, CALLER, nullptr, true, &finish_warp_barrier);
}

int sync_block(bool predicate) { return machine().block_barrier(CALLER, predicate); }

uint64_t atomic(void* address, int bytes, Atomic kind, uint64_t operand, uint64_t compare) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  machine().access(at, bytes, Machine::Kind::atomic, CALLER);
  ++machine().totals.atomics;
  uint64_t old = 0;
  std::memcpy(&old, address, bytes);
  const uint64_t result = atomic_result(old, kind, operand, compare);
  std::memcpy(address, &result, bytes);
  return old;
}

void* dynamic_shared() { return machine().dynamic_shared_memory(); }

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  machine().copy_async(reinterpret_cast<uintptr_t>(shared), reinterpret_cast<uintptr_t>(global), bytes, valid, CALLER);
}

void cp_async_commit() { machine().commit_copies(); }

void cp_async_wait(int pending) { machine().wait_copies(pending, CALLER); }

void ldmatrix(uint32_t* fragment, const void* row, int matrices, bool transposed) {
  MatrixLoad data{fragment, static_cast<const char*>(row), matrices, transposed};
  machine().collective("ldmatrix", 0xffffffffu, CALLER, &data, false, &finish_ldmatrix);
}

void mma(float* accumulator, const uint32_t* a, const uint32_t* b, Mma kind) {
  MmaData data{accumulator, a, b, kind};
  machine().collective("mma", 0xffffffffu, CALLER, &data, false, &finish_mma);
}

uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

float exp2_approx(float value) {
  const float result = std::exp2(value);
  return result < 0x1p-126f ? 0.0f : result;
}

void trap() { machine().fail("trap", "the kernel called __trap", CALLER); }

}  // namespace cmaclip::emulator

// ---- the compiler's hooks

namespace {

using cmaclip::emulator::Machine;

__attribute__((always_inline)) inline void hook(void* address, int bytes, Machine::Kind kind, void* caller,
                                                bool aligned = true) {
  static Machine& machine = Machine::instance();
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (!machine.running() || machine.on_stack(at)) return;
  machine.access(at, bytes, kind, machine.site(caller), aligned);
}

// A structure that is no vector is copied by words, as the device's compiler would.
void hook_range(void* address, size_t bytes, Machine::Kind kind, void* caller) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const size_t step = at % 4 == 0 && bytes % 4 == 0 ? 4 : 1;
  for (size_t offset = 0; offset < bytes; offset += step) {
    hook(reinterpret_cast<void*>(at + offset), static_cast<int>(step), kind, caller);
  }
}

}  // namespace

#define HOOKS(bytes)                                                                                                \
  extern "C" __attribute__((visibility("default"))) void __tsan_read##bytes(void* address) {                        \
    hook(address, bytes, Machine::Kind::read, __builtin_return_address(0));                                         \
  }                                                                                                                 \
  extern "C" __attribute__((visibility("default"))) void __tsan_write##bytes(void* address) {                       \
    hook(address, bytes, Machine::Kind::write, __builtin_return_address(0));                                        \
  }                                                                                                                 \
  extern "C" __attribute__((visibility("default"))) void __tsan_unaligned_read##bytes(void* address) {              \
    hook(address, bytes, Machine::Kind::read, __builtin_return_address(0), false);                                  \
  }                                                                                                                 \
  extern "C" __attribute__((visibility("default"))) void __tsan_unaligned_write##bytes(void* address) {             \
    hook(address, bytes, Machine::Kind::write, __builtin_return_address(0), false);                                 \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS

extern "C" __attribute__((visibility("default"))) void __tsan_read_range(void* address, size_t bytes) {
  hook_range(address, bytes, Machine::Kind::read, __builtin_return_address(0));
}
extern "C" __attribute__((visibility("default"))) void __tsan_write_range(void* address, size_t bytes) {
  hook_range(address, bytes, Machine::Kind::write, __builtin_return_address(0));
}
// Before each basic block: no loop runs for ever, whether or not it touches memory.
extern "C" __attribute__((visibility("default"))) void __sanitizer_cov_trace_pc() {
  static Machine& machine = Machine::instance();
  if (machine.running()) machine.step(machine.site(__builtin_return_address(0)));
}

extern "C" __attribute__((visibility("default"))) void __tsan_init() {}
extern "C" __attribute__((visibility("default"))) void __tsan_func_entry(void*) {}
extern "C" __attribute__((visibility("default"))) void __tsan_func_exit() {}
