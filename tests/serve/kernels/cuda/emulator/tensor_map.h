// What the emulator's cuTensorMapEncodeTiled writes instead of the driver's undocumented 128 bytes.
#pragma once

#include <cstdint>

namespace emulator {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x7E45'0123;
  uint32_t magic;
  uint32_t rank, element_bytes, swizzle_bytes;  // swizzle: 0, 32, 64 or 128
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 and on
  uint32_t sizes[5];
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulator
