// Conversions of single values, for packing and for machines without vector conversions.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline float float_from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

struct Bfloat16 {
  uint16_t bits;
  float to_float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
  static Bfloat16 from_float(float f) {
    const uint32_t b = bits_of(f);
    if (f != f) return {static_cast<uint16_t>((b >> 16) | 0x40)};
    return {static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16)};  // round to nearest, ties to even
  }
};

struct Float16 {
  uint16_t bits;
  float to_float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponents' biases differ by 112. Multiplying by 2^112 corrects that, and normalises subnormals exactly.
    return float_from_bits(sign | bits_of(float_from_bits(rest << 13) * float_from_bits((127 + 112) << 23)));
  }
  static Float16 from_float(float f) {
    const uint32_t b = bits_of(f), sign = (b >> 16) & 0x8000, rest = b & 0x7fffffff;
    if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
    if (rest < 0x38800000)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
      return {static_cast<uint16_t>(sign | (bits_of(float_from_bits(rest) + 0.5f) - bits_of(0.5f)))};
    return {static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13))};
  }
};

struct Int8 {
  int8_t value;
  float to_float() const { return value; }
  static Int8 from_float(float f) { return {static_cast<int8_t>(f)}; }  // f is an integer in range
};

struct Float32 {
  float value;
  float to_float() const { return value; }
  static Float32 from_float(float f) { return {f}; }
};

}  // namespace
