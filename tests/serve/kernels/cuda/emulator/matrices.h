// The tensor cores' operands in shared memory, and the sparse dot product.
#pragma once

#include <cmath>

#include "machine.h"

namespace emulator {

inline void need_all(uint32_t lanes) {
  if (lanes != 0xFFFFFFFFu) throw Error("not all lanes of the warp take part");
}

// The two columns of a group of four that its metadata keeps. Metadata that the manual calls undefined gives NaN, not
// an error: rows past the last out-feature may have it, because nobody reads their sums.
struct Kept {
  int first, second;
  double start;  // initial value of the group's sum
};

inline Kept kept(uint32_t metadata, int group) {
  uint32_t const bits = metadata >> 4 * group & 15;
  int const first = int(bits & 3), second = int(bits >> 2);
  return {first, second, first < second ? 0 : NAN};
}

// A row's kept values, two per group of four columns, times a column of inputs.
inline double sparse_dot(float const* values, std::span<Kept const> groups, float const* inputs) {
  double sum = 0;
  for (Kept const& kept : groups) {
    sum += kept.start + double(values[0]) * inputs[kept.first];
    sum += double(values[1]) * inputs[kept.second];
    values += 2;
    inputs += 4;
  }
  return sum;
}

using ToFloat = float (*)(uint16_t);
inline ToFloat float_of(bool bfloat16) { return bfloat16 ? &from_bfloat16 : &from_float16; }

// Swizzling permutes the 16-byte chunks within 128, 64 or 32 bytes by the index of the 128-byte line.
inline uint32_t swizzled(uint32_t address, uint32_t bytes) {
  uint32_t const mask = bytes ? bytes / 16 - 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

// A K-major operand in shared memory, as a matrix descriptor describes it.
struct SharedMatrix {
  uint32_t start, leading, stride, swizzle;

  // wgmma's descriptor.
  static SharedMatrix of_wgmma(uint64_t bits) {
    static constexpr uint32_t kSwizzles[] = {0, 128, 64, 32};
    if (bits >> 49 & 7) throw Error("a descriptor with a base offset");
    return {uint32_t(bits & 0x3FFF) << 4, uint32_t(bits >> 16 & 0x3FFF) << 4, uint32_t(bits >> 32 & 0x3FFF) << 4,
            kSwizzles[bits >> 62]};
  }

  // tcgen05's.
  static SharedMatrix of_tcgen05(uint64_t bits) {
    static constexpr uint32_t kSwizzles[] = {0, 0, 128, 0, 64, 0, 32, 0};
    uint32_t const mode = uint32_t(bits >> 61);
    bool const known = !(bits >> 49 & 15) && (bits >> 46 & 7) == 1 && (!mode || kSwizzles[mode]);
    if (!known) throw Error("the emulator does not know this kind of descriptor");
    return {uint32_t(bits & 0x3FFF) << 4, uint32_t(bits >> 16 & 0x3FFF) << 4, uint32_t(bits >> 32 & 0x3FFF) << 4,
            kSwizzles[mode]};
  }

  uint32_t place(uint32_t row, uint32_t byte) const {
    uint32_t const block = start + row / 8 * stride;
    if (!swizzle) return block + byte / 16 * leading + row % 8 * 16 + byte % 16;
    return swizzled(block + row % 8 * swizzle + byte, swizzle);
  }
};

// Reads values of `size` bytes: 1 for e4m3, 2 for bf16 or fp16.
inline std::vector<float> read_matrix(Block& block, SharedMatrix const& matrix, uint32_t first_row, uint32_t rows,
                                      uint32_t columns, uint32_t size, bool bfloat16) {
  std::vector<float> values(size_t(rows) * columns);
  ToFloat const value = float_of(bfloat16);
  for (uint32_t row = 0; row < rows; ++row)
    for (uint32_t column = 0; column < columns; ++column) {
      uint8_t const* const from = block.shared_at(matrix.place(first_row + row, column * size), size);
      values[row * columns + column] = size == 1 ? from_e4m3(*from) : value(uint16_t(from[0] | from[1] << 8));
    }
  return values;
}

}  // namespace emulator
