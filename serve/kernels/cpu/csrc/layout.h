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
// are not: the 16 first ones, then the 16 second ones. With 16-bit values that makes 9 bits per weight of the dense
// matrix, with 8-bit values 5, and every block starts on a cache line. int8 weights have one float32 scale per row; the
// scales follow the last tile.
#pragma once
#include <cstdint>

namespace ria {

constexpr int64_t kStripRows = 16;
constexpr int64_t kTileStrips = 2;
constexpr int64_t kTileRows = kStripRows * kTileStrips;
constexpr int64_t kBlockGroups = 8;
constexpr int64_t kPositionBytes = 8;  // per strip and group

// The dtype of the weights. Activations have the same, except that int8 weights take bfloat16 activations.
enum class Dtype : uint32_t { bfloat16 = 0, float16 = 1, float32 = 2, int8 = 3 };
constexpr int kNumDtypes = 4;

constexpr int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }
constexpr int64_t activation_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
constexpr bool interleaved(Dtype dtype) { return dtype == Dtype::bfloat16 || dtype == Dtype::int8; }
constexpr bool has_scales(Dtype dtype) { return dtype == Dtype::int8; }

// The first cache line of a packed tensor. It says what the tensor holds, so that a wrong one is refused.
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
  constexpr int64_t value_bytes() const { return 2 * kStripRows * item_size(dtype); }  // per strip and group
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
    return scales_offset() + (has_scales(dtype) ? strips() * kStripRows * static_cast<int64_t>(sizeof(float)) : 0);
  }
};

}  // namespace ria
