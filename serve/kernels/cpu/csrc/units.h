// How the packed form orders a block's values and positions for kernels that round activations to int8.
//
// A unit is two groups of four columns, of which a row keeps four. A block has four units. Its values come first, for
// each unit and strip those of 16 rows, then its positions, in the same order and in as many bytes as otherwise.
//
//   int8 values, 64 bytes:  four of row 0, four of row 1, ...
//   int4 values, 32 bytes:  32 bits for the rows r and r + 8: their four, plus 8, row r's in the high nibbles
//   positions, 16 bytes:    32 bits for the rows r, r + 4, r + 8 and r + 12. Each byte has the position of one of the
//                           four values, within its group: row r's in the lowest two bits
//
// So each row's four values, and the selectors of its four bytes, are one shift and one AND away from a vector that
// holds these bytes again and again.
//
// An 8:16 matrix has the same values: its groups have 16 columns, of which a row keeps eight, and of two units the
// first has a row's first four, the second its other four. Which columns are kept is stored as in layout.h.
#pragma once
#include "layout.h"

namespace ria {

constexpr int64_t kUnitChannels = 8;
constexpr int64_t kUnitWeights = kStripRows * kUnitChannels / 2;
constexpr int64_t kUnitPositionBytes = 2 * kPositionBytes;
constexpr int64_t kBlockUnits = kBlockGroups / 2;

// Puts the value `i` of a row's four of a unit: an int8, or the four bits of an int4.
inline void put_unit_value(Dtype dtype, uint8_t* unit, int64_t row, int64_t i, uint8_t value) {
  if (dtype == Dtype::int8)
    unit[row * 4 + i] = value;
  else
    unit[row % 8 * 4 + i] |= static_cast<uint8_t>(value << (row < 8 ? 4 : 0));
}

inline void put_unit_position(uint8_t* unit, int64_t row, int64_t i, int position) {
  unit[row % 4 * 4 + i] |= static_cast<uint8_t>(position << (row / 4 * 2));
}

}  // namespace ria
