// Conversions between float and the 16-bit formats, round to nearest even, as the hardware does them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace cmaclip::emulator {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;                                        // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);         // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                                      // below 2^-14: subnormal
    // Adding 0.5 makes the float's last mantissa bit worth 2^-24, so that the addition itself rounds.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline float bfloat16_to_float(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// To float, towards zero, with the last bit set where that was not exact; a second rounding then gives what one would.
inline float double_to_odd(double value) {
  float result = static_cast<float>(value);
  if (!std::isfinite(result) || static_cast<double>(result) == value) return result;
  if (std::fabs(static_cast<double>(result)) > std::fabs(value)) result = std::nextafter(result, 0.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(result) | 1u);
}

// a * b + c as a float rounded to odd, so that one more rounding to 16 bits is the only one that counts.
// a and b have at most 11 significant bits: their product is exact in double.
inline float fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  double sum = product + addend;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double shadow = sum - product;
  const double error = (product - (sum - shadow)) + (addend - shadow);
  if (error != 0.0 && (error < 0.0) != (sum < 0.0)) sum = std::nextafter(sum, 0.0);
  const float result = double_to_odd(sum);
  if (error == 0.0 || std::isinf(result)) return result;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(result) | 1u);
}

}  // namespace cmaclip::emulator
