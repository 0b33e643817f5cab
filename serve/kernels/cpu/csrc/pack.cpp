// Packs a weight: from the checkpoint's form to that of layout.h.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "scalar.h"
#include "units.h"

namespace ria {
namespace {

constexpr uint8_t kInvalid = 0xff;

// The positions a | b << 2 of the two bits set in a nibble.
constexpr uint8_t positions_of(int nibble) {
  switch (nibble) {
    case 0b0011: return 0 | 1 << 2;
    case 0b0101: return 0 | 2 << 2;
    case 0b1001: return 0 | 3 << 2;
    case 0b0110: return 1 | 2 << 2;
    case 0b1010: return 1 | 3 << 2;
    case 0b1100: return 2 | 3 << 2;
    default: return kInvalid;
  }
}

struct Packing {
  Layout layout;
  const uint8_t* values;
  const uint8_t* bitmask;
  GivenScales scales;
  uint8_t* packed;
  int64_t gates;
  std::atomic<int64_t> first_invalid_group{INT64_MAX};   // row * groups + group
  std::atomic<int64_t> first_invalid_scales{INT64_MAX};  // row
};

void keep_smallest(std::atomic<int64_t>& smallest, int64_t found) {
  int64_t seen = smallest.load();
  while (found < seen && !smallest.compare_exchange_weak(seen, found)) {
  }
}

// The given row that a packed one holds, or -1 if it holds none.
int64_t source_row(const Layout& layout, int64_t gates, int64_t row) {
  if (gates == 0) return row < layout.rows ? row : -1;
  const int64_t strip = row / kStripRows, channel = strip / 2 * kStripRows + row % kStripRows;
  return channel < gates ? channel + strip % 2 * gates : -1;
}

// Where a group of a strip and row goes.
struct Place {
  const Layout& layout;
  uint8_t* block;
  int64_t group, strips, strip, lane;

  Int4Bits int4_bits() const { return Int4Bits::of(static_cast<int>(group), layout.pattern / 4); }
  uint16_t* int4_words() const {
    return reinterpret_cast<uint16_t*>(block + strip * layout.strip_block_bytes()) + 2 * lane;
  }
  // As the group's first or second value, the one that is `index` values after `values`.
  void put_value(int64_t second, const uint8_t* values, int64_t index) const {
    if (layout.dtype == Dtype::int4) {
      const int value = (values[index / 2] >> index % 2 * 4 & 15) ^ 8;  // the checkpoint stores value + 8
      int4_words()[int4_bits().value_line * 2 * kStripRows + second] |= value << int4_bits().value_bit;
      return;
    }
    const int64_t item = bits(layout.dtype) / 8, slot = group * strips + strip;
    const int64_t at = interleaved(layout.dtype) ? 2 * lane + second : lane + second * kStripRows;
    std::memcpy(block + slot * layout.value_bytes() + at * item, values + index * item, item);
  }
};

// Puts a row's two values of a group, which lie at `pair`, and their positions into a block.
void pack_group(const Place& place, const uint8_t* pair, uint8_t positions) {
  const Layout& layout = place.layout;
  for (int i = 0; i < 2; ++i) place.put_value(i, pair, i);
  if (layout.dtype == Dtype::int4) {
    const Int4Bits at = place.int4_bits();
    for (int i = 0; i < 2; ++i)
      place.int4_words()[at.position_line * 2 * kStripRows + i] |= (positions >> 2 * i & 3) << at.position_bit;
  } else {
    uint8_t* all_positions = place.block + kBlockGroups * place.strips * layout.value_bytes();
    const int64_t slot = place.group * place.strips + place.strip;
    all_positions[slot * kPositionBytes + place.lane / 2] |= positions << (place.lane % 2 * 4);
  }
}

// The same of the eight values of 16 columns.
void pack_four_groups(Place place, const uint8_t* values) {
  for (int64_t i = 0; i < 8; i += 2, ++place.group)
    for (int64_t j = 0; j < 2; ++j) place.put_value(1 - j, values, i + j);
}

// The same for kernels that round activations to int8.
void pack_unit(const Layout& layout, const uint8_t* pair, uint8_t positions, int64_t group, int64_t strips,
               int64_t strip, int64_t lane, uint8_t* block) {
  const int64_t slot = group / 2 * strips + strip;
  uint8_t* values = block + slot * 2 * layout.value_bytes();
  uint8_t* all_positions = block + kBlockGroups * strips * layout.value_bytes();
  for (int64_t i = 0; i < 2; ++i) {
    const uint8_t value = layout.dtype == Dtype::int8 ? pair[i] : *pair >> (4 * i) & 15;
    put_unit_value(layout.dtype, values, lane, group % 2 * 2 + i, value);
    put_unit_position(all_positions + slot * kUnitPositionBytes, lane, group % 2 * 2 + i, positions >> (2 * i) & 3);
  }
}

// The same of the eight values of 16 columns.
void pack_unit_of_16(const Layout& layout, const uint8_t* values, int64_t group, int64_t strips, int64_t strip,
                     int64_t lane, uint8_t* block) {
  const int64_t unit = group / 2, vector_bytes = 2 * layout.value_bytes();
  for (int64_t i = 0; i < 8; ++i) {
    const uint8_t value = layout.dtype == Dtype::int8 ? values[i] : values[i / 2] >> (i % 2 * 4) & 15;
    put_unit_value(layout.dtype, block + ((unit + i / 4) * strips + strip) * vector_bytes, lane, i % 4, value);
  }
}

// Puts the scales of a row's groups behind their blocks.
void pack_group_scales(const Layout& layout, const uint8_t* scales, int64_t strips, int64_t strip, int64_t lane,
                       uint8_t* stream) {
  const int64_t item = bits(layout.scale_dtype) / 8, sections = layout.columns / layout.group_size;
  for (int64_t section = 0; section < sections; ++section)
    std::memcpy(stream + layout.section_scales_offset(section, strips) + (strip * kStripRows + lane) * item,
                scales + section * item, item);
}

double scale_of(Dtype dtype, const uint8_t* scales, int64_t i) {
  if (dtype == Dtype::float32) {
    float value;
    std::memcpy(&value, scales + i * sizeof value, sizeof value);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, scales + i * sizeof value, sizeof value);
  return dtype == Dtype::bfloat16 ? Bfloat16{value}.to_float() : Float16{value}.to_float();
}

// Writes the multipliers of a row's blocks and returns the row's scale; nothing if the scales are no multiples. Groups
// of zeros, such as padding, may have any scale. `values` and `scales`: of this row.
std::optional<float> pack_multipliers(const Layout& layout, const GivenScales& given, const uint8_t* values,
                                      const uint8_t* scales, int64_t lane, uint8_t* to) {
  const int64_t groups = given.group_size ? layout.columns / given.group_size : 1;
  const int64_t blocks = layout.blocks() / groups, bytes = layout.columns / 4 / groups;
  const auto is_zero = [&](int64_t group) {
    const uint8_t* of_group = values + group * bytes;
    return std::all_of(of_group, of_group + bytes, [](uint8_t two) { return two == 0x88; });
  };
  double least = 0;
  for (int64_t i = 0; i < groups; ++i)
    if (const double scale = scale_of(given.dtype, scales, i); !is_zero(i)) {
      if (!(scale > 0) && groups > 1) return std::nullopt;
      least = least == 0 ? scale : std::min(least, scale);
    }
  for (int divisor = 1; divisor <= kMaxMultiplier; ++divisor) {  // products are exact: of up to 24 and 4 bits
    const float scale = static_cast<float>(least / divisor);
    const auto multiplier = [&](int64_t group) {
      if (groups == 1 || is_zero(group)) return 1;
      const double product = scale_of(given.dtype, scales, group) * divisor, rounded = std::nearbyint(product / least);
      return rounded <= kMaxMultiplier && rounded * least == product ? static_cast<int>(rounded) : 0;
    };
    bool fits = static_cast<double>(scale) * divisor == least;
    for (int64_t group = 0; fits && group < groups; ++group) fits = multiplier(group) > 0;
    if (!fits) continue;
    for (int64_t block = 0; block < layout.blocks(); ++block)
      to[block * kMultiplierBytes + lane % 8] |= static_cast<uint8_t>(multiplier(block / blocks) << (lane < 8 ? 0 : 4));
    return scale;
  }
  return std::nullopt;
}

// The sum of a row's integers, times their blocks' multipliers, which `pack_multipliers` wrote.
int32_t sum_of(const Layout& layout, const uint8_t* values, int64_t lane, const uint8_t* multipliers) {
  const int64_t of_block = kBlockGroups * pair_bytes(layout.dtype);  // bytes
  int32_t sum = 0;
  for (int64_t block = 0; block < layout.blocks(); ++block, values += of_block) {
    int32_t in_block = 0;
    for (int64_t i = 0; i < of_block; ++i)
      in_block +=
          layout.dtype == Dtype::int8 ? static_cast<int8_t>(values[i]) : (values[i] & 15) + (values[i] >> 4) - 16;
    const int multiplier =
        layout.has_multipliers() ? multipliers[block * kMultiplierBytes + lane % 8] >> (lane < 8 ? 0 : 4) & 15 : 1;
    sum += in_block * multiplier;
  }
  return sum;
}

void pack_tile(Packing& packing, int64_t tile) {
  const Layout& layout = packing.layout;
  const int64_t strips = layout.strips_in(tile), groups = layout.groups(), pair = pair_bytes(layout.dtype);
  uint8_t* stream = packing.packed + layout.tile_offset(tile);
  std::memset(stream, 0, strips * layout.strip_bytes());  // rows that hold none: weights, positions and scales are 0

  for (int64_t r = 0; r < strips * kStripRows; ++r) {
    const int64_t row = source_row(layout, packing.gates, tile * kTileRows + r);
    if (row < 0) continue;
    const int64_t strip = r / kStripRows, lane = r % kStripRows;
    const uint8_t* values = packing.values + row * groups * pair;
    const uint8_t* bitmask = packing.bitmask + row * groups / 2;
    const GivenScales& given = packing.scales;
    const uint8_t* scales = static_cast<const uint8_t*>(given.values);
    if (scales) scales += row * (given.group_size ? layout.columns / given.group_size : 1) * bits(given.dtype) / 8;
    if (layout.has_row_scales()) {
      uint8_t* to = packing.packed + layout.row_scales_offset() + (tile * kTileRows + r) * sizeof(float);
      if (layout.has_multipliers()) {
        const std::optional<float> scale =
            pack_multipliers(layout, given, values, scales, lane, stream + strip * layout.multiplier_bytes());
        if (!scale) return keep_smallest(packing.first_invalid_scales, row);
        std::memcpy(to, &*scale, sizeof(float));
      } else {
        std::memcpy(to, scales, sizeof(float));
      }
    }
    if (layout.int8_activations) {
      const int32_t sum = sum_of(layout, values, lane, stream + strip * layout.multiplier_bytes());
      std::memcpy(packing.packed + layout.row_sums_offset() + (tile * kTileRows + r) * sizeof sum, &sum, sizeof sum);
    }
    if (layout.group_size) pack_group_scales(layout, scales, strips, strip, lane, stream);
    for (int64_t group = 0; group < groups; group += layout.pattern / 4) {
      const uint8_t* kept = bitmask + group / 2;
      const uint8_t positions = positions_of(*kept >> (group % 2 * 4) & 15);
      if (layout.pattern == 4 ? positions == kInvalid : __builtin_popcount(kept[0] | kept[1] << 8) != 8) {
        keep_smallest(packing.first_invalid_group, row * groups + group);
        return;
      }
      uint8_t* block = stream + layout.block_offset(group / kBlockGroups, strips);
      const int64_t in_block = group % kBlockGroups;
      const Place place{layout, block, in_block, strips, strip, lane};
      if (layout.pattern == 16)
        std::memcpy(block + layout.masks_offset(in_block, strips, strip) + mask_offset(lane), kept, 2);
      if (layout.int8_activations && layout.pattern == 16)
        pack_unit_of_16(layout, values + group * pair, in_block, strips, strip, lane, block);
      else if (layout.int8_activations)
        pack_unit(layout, values + group * pair, positions, in_block, strips, strip, lane, block);
      else if (layout.pattern == 16)
        pack_four_groups(place, values + group * pair);
      else
        pack_group(place, values + group * pair, positions);
    }
  }
}

}  // namespace

void ask_for_huge_pages(uint8_t* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + huge - 1) / huge * huge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void pack(const Layout& layout, const void* values, const uint8_t* bitmask, GivenScales scales, uint8_t* packed,
          int64_t gates) {
  const Header header = layout.header();
  std::memcpy(packed, &header, sizeof header);
  std::memset(packed + layout.row_scales_offset(), 0, layout.bytes() - layout.row_scales_offset());
  Packing packing{layout, static_cast<const uint8_t*>(values), bitmask, scales, packed, gates};
  parallel_for(
      layout.tiles(), 1,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t tile = begin; tile < end; ++tile) pack_tile(*static_cast<Packing*>(context), tile);
      },
      &packing);
  const int64_t invalid = packing.first_invalid_group.load();
  if (invalid != INT64_MAX) {
    const int64_t row = invalid / layout.groups(), column = invalid % layout.groups() * 4;
    throw std::runtime_error(std::string("the bitmask is not ") + (layout.pattern == 4 ? "2:4" : "8:16") + ": row " +
                             std::to_string(row) + ", columns " + std::to_string(column) + " to " +
                             std::to_string(column + layout.pattern - 1) + " must keep exactly " +
                             (layout.pattern == 4 ? "two" : "eight") + " values");
  }
  if (const int64_t row = packing.first_invalid_scales.load(); row != INT64_MAX)
    throw std::runtime_error(
        "row " + std::to_string(row) +
        ": with inputs rounded to int8, the scales of a row's "
        "groups must be multiples, 1 to 15, of one number; quantize it again with ria-vllm compress --scheme W4A8");
}

}  // namespace ria
