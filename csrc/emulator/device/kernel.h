// Makes an instantiated kernel callable by name from Python:
//   CMACLIP_EMULATE("scale_f32", cmaclip::scale_kernel<float>)
// and, with the same macro, host functions of numbers, such as those that choose a grid or a shared memory size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace cmaclip::emulator {

struct Parameter {
  enum Kind : int { pointer, integer, floating, structure };
  Kind kind;
  uint32_t bytes;
  // For pointers: the element's size (0 for void) and whether the kernel may only read.
  uint32_t element_bytes;
  bool constant;
};

struct Function {
  const char* name;
  const Parameter* parameters;
  int parameter_count;
  // 0: a kernel; else the size of a number, floating or integer.
  int result_bytes;
  bool result_floating;
  void (*invoke)(void* const* arguments, void* result);
};

__attribute__((visibility("default"))) int register_function(const Function& function);

template <class T>
constexpr Parameter describe() {
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_pointer_t<T>;
    uint32_t bytes = 0;
    if constexpr (!std::is_void_v<Element>) bytes = sizeof(Element);
    return {Parameter::pointer, sizeof(T), bytes, std::is_const_v<Element>};
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    return {Parameter::integer, sizeof(T), 0, false};
  } else if constexpr (std::is_floating_point_v<T>) {
    return {Parameter::floating, sizeof(T), 0, false};
  } else {
    static_assert(std::is_trivially_copyable_v<T>, "a kernel's parameters are copied as bytes");
    return {Parameter::structure, sizeof(T), 0, false};
  }
}

template <auto Target>
struct Entry;

template <class Result, class... Arguments, Result (*Target)(Arguments...)>
struct Entry<Target> {
  static constexpr Parameter parameters[sizeof...(Arguments) + 1] = {describe<std::remove_cv_t<Arguments>>()..., {}};

  // Not instrumented: it reads the host's copy of the arguments.
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) static void call(void* const* arguments, [[maybe_unused]] void* result,
                                                          std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      Target(*static_cast<std::remove_cv_t<Arguments>*>(arguments[I])...);
    } else {
      static_assert(std::is_arithmetic_v<Result>, "a host function returns a number");
      *static_cast<Result*>(result) = Target(*static_cast<std::remove_cv_t<Arguments>*>(arguments[I])...);
    }
  }

  __attribute__((no_sanitize("thread"))) static void invoke(void* const* arguments, void* result) {
    call(arguments, result, std::index_sequence_for<Arguments...>{});
  }

  static int add(const char* name) {
    int result_bytes = 0;
    if constexpr (!std::is_void_v<Result>) result_bytes = sizeof(Result);
    return register_function({name, parameters, static_cast<int>(sizeof...(Arguments)), result_bytes,
                              std::is_floating_point_v<Result>, &invoke});
  }
};

}  // namespace cmaclip::emulator

#define CMACLIP_EMULATE_JOIN2(a, b) a##b
#define CMACLIP_EMULATE_JOIN(a, b) CMACLIP_EMULATE_JOIN2(a, b)
#define CMACLIP_EMULATE(name, ...)                                                      \
  [[maybe_unused]] static const int CMACLIP_EMULATE_JOIN(cmaclip_emulated_, __COUNTER__) = \
      ::cmaclip::emulator::Entry<&__VA_ARGS__>::add(name);
