// The packed form of a 2:4 matrix, the same for prefill and decode.
//
// Rows come in strips of 16 (one vector of fp32 accumulators). Two strips make a tile; the last tile may have only one.
// A tile is a contiguous stream of blocks, one block per 8 groups of four columns, in the order the kernels read:
//
//   for each of the 8 groups, for each strip:  the two kept values of 16 rows  (32 values)
//   for each of the 8 groups, for each strip:  their positions, 4 bits a row   (8 bytes)
//
// A row's 4 bits are a | b << 2, where a < b are the kept columns of the group. bfloat16 and int8 values are
// interleaved: a row's two lie side by side, as the pairwise dot product (VNNI) takes them. float16 and float32 values
// are not: the 16 first ones, then the 16 second ones. That makes 9 bits per weight of the dense matrix with 16-bit
// values and 5 with int8, and every block starts on a cache line.
//
// With int4 values it makes 3 bits, and a block is, for each strip, three cache lines of 32 words of 16 bits. The words
// 2r and 2r + 1 belong to the first and second values of row r. A value (two's complement) and its position are six
// bits side by side, so that one shift of a line gives an index into a table of values and an index that picks the
// activations. `Int4Bits` says where; the groups 2 and 5 find no room for six, and their positions are in the last
// line.
//
// An 8:16 matrix takes as many bytes. A row keeps eight values of four groups, two for each in ascending order, of
// which the second comes first: so vdpbf16ps adds their products in the order of the columns. Instead of positions it
// has, for each strip and four groups, which columns are kept: 16 bits for each row, those of the even rows first. The
// values of int4 fill two lines, and these bits the third.
//
// units.h has the order for kernels that round activations to int8.
//
// int8 and int4 weights have scales, in one of three ways. One float32 per row: they follow the last tile. Or one for
// `group_size` columns of a row, whole blocks: such a section of a tile's blocks is followed by its scales, for each
// strip those of 16 rows, in the dtype in which they were given. For kernels that round activations to int8, a row has
// one scale, and int4 weights a multiplier besides, 1 to 15, for each block: then every product is an integer. A tile
// begins with them, strip by strip, 4 bits for each row: rows 0 to 7 in the low halves of eight bytes, 8 to 15 in the
// high ones. The rows' scales are followed by the sums of their integers, times the multipliers, int32.
#pragma once
#include <cstdint>

namespace ria {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kStripRows = 16;
constexpr int64_t kTileStrips = 2;
constexpr int64_t kTileRows = kStripRows * kTileStrips;
constexpr int64_t kBlockGroups = 8;
constexpr int64_t kPositionBytes = 8;    // per strip and group
constexpr int64_t kMultiplierBytes = 8;  // per strip and block
constexpr int kMaxMultiplier = 15;       // times -8 is an int8

// The dtype of the weights. Activations have the same, except that int8 and int4 weights take any floating-point ones;
// those of experts are bfloat16, or any that the kernel rounds to int8.
enum class Dtype : uint32_t { bfloat16 = 0, float16 = 1, float32 = 2, int8 = 3, int4 = 4 };
// With int8 activations, int32 holds the sums of so many columns: half of them, each at most 2^15, and the same again
// for the offset of unsigned activations.
constexpr int64_t kMaxInt8Columns = 131072;
constexpr int kNumDtypes = 5;

constexpr int64_t bits(Dtype dtype) {
  return dtype == Dtype::float32 ? 32 : dtype == Dtype::int8 ? 8 : dtype == Dtype::int4 ? 4 : 16;
}
constexpr int64_t pair_bytes(Dtype dtype) { return 2 * bits(dtype) / 8; }  // of the two kept values of a group
constexpr bool has_scales(Dtype dtype) { return dtype == Dtype::int8 || dtype == Dtype::int4; }
constexpr bool interleaved(Dtype dtype) { return dtype == Dtype::bfloat16 || has_scales(dtype); }

// Where the words of a block hold the int4 values and the positions of one of its groups.
struct Int4Bits {
  int value_line, value_bit, position_line, position_bit;

  // `vectors`: 4 for 8:16, whose positions are bits of columns.
  static constexpr Int4Bits of(int group, int64_t vectors) {
    if (vectors == 4) return {group / 4, group % 4 * 4, 0, 0};
    const int line = group / 3, place = group % 3;
    return place < 2 ? Int4Bits{line, 6 * place + 2, line, 6 * place} : Int4Bits{line, 12, 2, 12 + 2 * line};
  }
};

// The first cache line of a packed tensor. It says what the tensor holds, so that a wrong one is refused.
struct Header {
  static constexpr uint64_t kMagic = 0x0005343261697200;  // "\0ria24" and the layout's version
  uint64_t magic;
  int64_t rows;
  int64_t columns;
  Dtype dtype, scale_dtype;
  uint32_t group_size, int8_activations;
  uint32_t pattern;
  uint32_t reserved[5];
};
static_assert(sizeof(Header) == 64, "the stream after the header starts on a cache line");

struct Layout {
  int64_t rows, columns;
  Dtype dtype;
  int64_t group_size = 0;              // columns that share a scale; 0: one scale per row, or none
  Dtype scale_dtype = Dtype::float32;  // of groups: bfloat16, float16 or float32
  bool int8_activations = false;       // the kernel rounds activations to int8: units.h has the order
  int64_t pattern = 4;                 // half of each so many columns are kept: 4 or 16

  static Layout of(const Header& header) {
    return {header.rows,       header.columns,     header.dtype,
            header.group_size, header.scale_dtype, header.int8_activations != 0,
            header.pattern};
  }
  Header header() const {
    return {Header::kMagic,
            rows,
            columns,
            dtype,
            scale_dtype,
            static_cast<uint32_t>(group_size),
            int8_activations,
            static_cast<uint32_t>(pattern),
            {}};
  }
  // Whether a header is that of a layout.
  static constexpr bool valid(const Header& header) {
    const Dtype dtype = header.dtype, scales = header.scale_dtype;
    return header.magic == Header::kMagic && header.rows > 0 && header.columns > 0 && header.columns % 64 == 0 &&
           static_cast<uint32_t>(dtype) < kNumDtypes && header.int8_activations <= has_scales(dtype) &&
           valid_pattern(header.pattern) &&
           (header.group_size == 0
                ? scales == Dtype::float32
                : has_scales(dtype) && !header.int8_activations && valid_group(header.group_size, header.columns) &&
                      static_cast<uint32_t>(scales) < static_cast<uint32_t>(Dtype::int8));
  }
  static constexpr bool valid_group(int64_t group_size, int64_t columns) {
    return (group_size == 32 || group_size == 64 || group_size == 128) && columns % group_size == 0;
  }

  static constexpr bool valid_pattern(int64_t pattern) { return pattern == 4 || pattern == 16; }

  // Where the bits of a strip's columns are in a block of an 8:16 matrix, for the four groups from this one on.
  constexpr int64_t masks_offset(int64_t group, int64_t strips, int64_t strip) const {
    return dtype == Dtype::int4 && !int8_activations
               ? strip * strip_block_bytes() + kBlockGroups * value_bytes() + group * kPositionBytes
               : kBlockGroups * strips * value_bytes() + (group * strips + 4 * strip) * kPositionBytes;
  }
  constexpr bool has_row_scales() const { return has_scales(dtype) && group_size == 0; }
  constexpr bool has_multipliers() const { return int8_activations && dtype == Dtype::int4; }
  constexpr int64_t multiplier_bytes() const {  // of a strip, in whole cache lines
    return has_multipliers() ? (blocks() * kMultiplierBytes + kCacheLine - 1) / kCacheLine * kCacheLine : 0;
  }
  constexpr int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  constexpr int64_t tiles() const { return (strips() + kTileStrips - 1) / kTileStrips; }
  constexpr int64_t groups() const { return columns / 4; }
  constexpr int64_t blocks() const { return groups() / kBlockGroups; }
  constexpr int64_t value_bytes() const { return kStripRows * pair_bytes(dtype); }  // per strip and group
  constexpr int64_t strip_block_bytes() const { return kBlockGroups * (value_bytes() + kPositionBytes); }
  // Blocks that share their scales, or all of them.
  constexpr int64_t section_blocks() const { return group_size ? group_size / (4 * kBlockGroups) : blocks(); }
  constexpr int64_t strip_scale_bytes() const { return group_size ? kStripRows * bits(scale_dtype) / 8 : 0; }
  constexpr int64_t strip_section_bytes() const { return section_blocks() * strip_block_bytes() + strip_scale_bytes(); }
  // Where a block, or the scales of a section, begin in a tile of so many strips.
  constexpr int64_t block_offset(int64_t block, int64_t strips) const {
    return strips * (multiplier_bytes() + block * strip_block_bytes() + block / section_blocks() * strip_scale_bytes());
  }
  constexpr int64_t section_scales_offset(int64_t section, int64_t strips) const {
    return strips * ((section + 1) * strip_section_bytes() - strip_scale_bytes());
  }
  constexpr int64_t strip_bytes() const { return block_offset(blocks(), 1); }
  constexpr int64_t strips_in(int64_t tile) const {
    return strips() - tile * kTileStrips < kTileStrips ? strips() - tile * kTileStrips : kTileStrips;
  }
  constexpr int64_t tile_offset(int64_t tile) const {
    return static_cast<int64_t>(sizeof(Header)) + tile * kTileStrips * strip_bytes();
  }
  constexpr int64_t row_scales_offset() const {
    return static_cast<int64_t>(sizeof(Header)) + strips() * strip_bytes();
  }
  constexpr int64_t row_sums_offset() const {
    return row_scales_offset() + (has_row_scales() ? strips() * kStripRows * static_cast<int64_t>(sizeof(float)) : 0);
  }
  constexpr int64_t bytes() const {
    return row_sums_offset() + (int8_activations ? strips() * kStripRows * static_cast<int64_t>(sizeof(int32_t)) : 0);
  }
};

// Where the bits of a row's 16 columns are, in bytes.
constexpr int64_t mask_offset(int64_t row) { return 2 * (row % 2 * 8 + row / 2); }

// The eight positions that the bits of 16 columns have, a byte each, in ascending order.
struct PositionTable {
  uint64_t low[256] = {}, high[256] = {};  // those of eight columns, from the lowest byte up; up to the highest byte
  constexpr PositionTable() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0, at = 0; i < 8; ++i)
        if (bits >> i & 1) low[bits] |= static_cast<uint64_t>(i) << 8 * at++;
      for (int i = 7, at = 7; i >= 0; --i)
        if (bits >> i & 1) high[bits] |= static_cast<uint64_t>(8 + i) << 8 * at--;
    }
  }
  uint64_t of(uint8_t first, uint8_t second) const { return low[first] | high[second]; }
};
inline constexpr PositionTable kPositionTable;

}  // namespace ria
