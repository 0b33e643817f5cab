// The packed form of a 2:4 matrix, one for decode and prompts.
//
// Rows come in strips of 16 (one vector of fp32 accumulators), two strips make a tile; the last tile may have one.
// A tile is a contiguous stream of blocks, one block per 8 groups of four columns, in the order the kernels read:
//
//   for each of the 8 groups, for each strip:  the two kept values of 16 rows  (32 values)
//   for each of the 8 groups, for each strip:  their positions, 4 bits a row   (8 bytes)
//
// A row's 4 bits are a | b << 2 where a < b are the kept columns of the group. bfloat16 values lie in pairs, a row's
// two beside each other, as the pairwise dot product wants them, and so do int8; float16 and float32 as 16 first, then
// 16 second ones. At 16 bits a value that is 9 bits per weight of the dense matrix, at 8 bits 5, and every block starts
// on a cache line. int8 weights have one float32 scale a row; the scales follow the last tile.
#pragma once
#include <cstdint>

namespace ria {

constexpr int64_t kStripRows = 16;
constexpr int64_t kTileStrips = 2;
constexpr int64_t kTileRows = kStripRows * kTileStrips;
constexpr int64_t kBlockGroups = 8;
constexpr int64_t kPositionBytes = 8;  // of one strip and group

// Of the weights. Activations have the same, but for int8, whose activations are bfloat16.
enum class Dtype : uint32_t { bfloat16 = 0, float16 = 1, float32 = 2, int8 = 3 };
constexpr int kDtypes = 4;

constexpr int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }
constexpr int64_t activation_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
constexpr bool in_pairs(Dtype dtype) { return dtype == Dtype::bfloat16 || dtype == Dtype::int8; }
constexpr bool scaled(Dtype dtype) { return dtype == Dtype::int8; }

// First cache line of a packed tensor: what it holds, so that a wrong tensor is refused instead of read.
struct Header {
  static constexpr uint64_t kMagic = 0x0002343261697200;  // "\0ria24" and the layout's version
  uint64_t magic;
  int64_t rows;
  int64_t columns;
  Dtype dtype;
  uint32_t reserved[9];
};
static_assert(sizeof(Header) == 64, "the stream after the header starts on a cache line");

struct Layout {
  int64_t rows, columns;
  Dtype dtype;

  constexpr int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  constexpr int64_t tiles() const { return (strips() + kTileStrips - 1) / kTileStrips; }
  constexpr int64_t groups() const { return columns / 4; }
  constexpr int64_t blocks() const { return groups() / kBlockGroups; }
  constexpr int64_t value_bytes() const { return 2 * kStripRows * item_size(dtype); }  // of one strip and group
  constexpr int64_t strip_block_bytes() const { return kBlockGroups * (value_bytes() + kPositionBytes); }
  constexpr int64_t strips_in(int64_t tile) const {
    return strips() - tile * kTileStrips < kTileStrips ? strips() - tile * kTileStrips : kTileStrips;
  }
  constexpr int64_t tile_offset(int64_t tile) const {
    return static_cast<int64_t>(sizeof(Header)) + tile * kTileStrips * blocks() * strip_block_bytes();
  }
  constexpr int64_t scales_offset() const {
    return static_cast<int64_t>(sizeof(Header)) + strips() * blocks() * strip_block_bytes();
  }
  constexpr int64_t bytes() const {
    return scales_offset() + (scaled(dtype) ? strips() * kStripRows * static_cast<int64_t>(sizeof(float)) : 0);
  }
};

}  // namespace ria
