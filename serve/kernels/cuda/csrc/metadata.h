// Converts the checkpoint's bitmask to the metadata operand of the sparse tensor cores.
//
// A group of four columns keeps two. The hardware takes their indices, two bits each, the smaller one in the low bits:
// four bits per group, so a byte of bitmask (eight columns, two groups) becomes a byte of metadata. Architectures
// differ only in where that byte lies, which MetadataLayout derives from the kernels' own definitions.
#pragma once

#include <cstdint>

#include "cutlass/cutlass.h"

#if RIA_FAMILY == 90
#include "cute/atom/mma_traits_sm90_gmma_sparse.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#elif RIA_FAMILY == 100
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm1xx_sparse_config.inl"
#else
#include "cutlass/layout/matrix.h"
#endif

namespace ria {

// The metadata of each group's bitmask. One with other than two bits set cannot come from a valid checkpoint; it maps
// to "the first two", so that no input makes the hardware's behaviour undefined.
constexpr uint64_t kGroupMetadata = [] {
  uint64_t table = 0;
  for (int mask = 0; mask < 16; ++mask) {
    int kept[4] = {}, count = 0;
    for (int i = 0; i < 4; ++i)
      if (mask >> i & 1) kept[count++] = i;
    uint64_t const indices = count == 2 ? kept[0] | kept[1] << 2 : 0b0100;
    table |= indices << 4 * mask;
  }
  return table;
}();

CUTLASS_HOST_DEVICE constexpr uint8_t metadata_byte(uint8_t mask) {
  return static_cast<uint8_t>((kGroupMetadata >> 4 * (mask & 15) & 15) | (kGroupMetadata >> 4 * (mask >> 4) & 15) << 4);
}

CUTLASS_HOST_DEVICE constexpr int round_up(int size, int multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Where the metadata lies, for values of kValueBits bits: 16 (bf16 and fp16 share one layout), on Hopper also 8 (fp8),
// and for mma.sp also 8 (int8).
template <int kValueBits>
struct MetadataLayout;

#if RIA_FAMILY == 90 || RIA_FAMILY == 100

#if RIA_FAMILY == 90
// The layout depends on the tile's K up to this size, so every tile must have at least this K.
constexpr int kMetadataTileK = 128;
// The K of a tile. Metadata is padded to a multiple of it: outside, TMA would read zeros, which are no valid metadata.
template <int kValueBits>
constexpr int kTileK = kValueBits == 8 ? 256 : 128;

template <int kValueBits>
using SparseConfig = cutlass::Sm90GemmSparseConfig<
    cute::sparse_elem<2, cute::conditional_t<kValueBits == 8, cutlass::float_e4m3_t, cutlass::bfloat16_t>>,
    cute::GMMA::Major::K, cute::sparse_elem<8, uint8_t>, cute::Int<kMetadataTileK>>;
#else
template <int kValueBits>
using SparseConfig = cutlass::Sm1xxGemmSparseConfig<cute::sparse_elem<2, cutlass::bfloat16_t>,
                                                    cutlass::layout::RowMajor, cute::sparse_elem<8, uint8_t>>;
template <int kValueBits>
constexpr int kTileK = 128;
#endif

template <int kValueBits>
struct MetadataLayout {
  using Config = SparseConfig<kValueBits>;
  static constexpr int kRowMultiple = int(typename Config::TensorEAtomM{});
  static constexpr int kColumnMultiple = kTileK<kValueBits>;
  static_assert(kColumnMultiple % int(typename Config::TensorEAtomK{}) == 0);
  decltype(Config::fill_layoutE(cute::make_tuple(0, 1, 0, 1))) layout;

  CUTLASS_HOST_DEVICE MetadataLayout(int rows, int columns)
      : layout(Config::fill_layoutE(cute::make_tuple(rows, 1, round_up(columns, kColumnMultiple), 1))) {}

  // Byte offset of the metadata of `row`, columns 8 * byte_column to 8 * byte_column + 7.
  CUTLASS_HOST_DEVICE int64_t offset(int row, int byte_column) const { return layout(row, 8 * byte_column, 0) / 8; }
};

#else

// mma.sp reads its metadata with ldmatrix. An element has 16 bits (four groups), or 32 for 8-bit values. Columns of
// elements are interleaved by two, the rows of each 32 (16) are permuted so that a thread's 8-row blocks lie together,
// and 2 x 2 blocks are transposed. Columns are padded to the K of a tile.
template <int kValueBits>
struct MetadataLayout {
  static constexpr int kElementBytes = 32 / kValueBits;
  static constexpr int kElementColumns = 8 * kElementBytes;
  static constexpr int kRowMultiple = 64 / kElementBytes;
  static constexpr int kColumnMultiple = 1024 / kValueBits;
  cutlass::layout::ColumnMajorInterleaved<2> layout;

  CUTLASS_HOST_DEVICE MetadataLayout(int rows, int columns)
      : layout(cutlass::layout::ColumnMajorInterleaved<2>::packed(
            {round_up(rows, kRowMultiple), round_up(columns, kColumnMultiple) / kElementColumns})) {}

  CUTLASS_HOST_DEVICE int64_t offset(int row, int byte_column) const {
    int const block = row / kRowMultiple * kRowMultiple;
    int const permuted_row = block + row % 8 * (kRowMultiple / 8) + row % kRowMultiple / 8;
    int const element = byte_column / kElementBytes;
    int const corner = permuted_row % 2 - element % 2;  // 1 below the diagonal of its 2 x 2 block, -1 above
    return kElementBytes * layout({permuted_row - corner, element + corner}) + byte_column % kElementBytes;
  }
};

#endif

template <class Layout>
CUTLASS_HOST_DEVICE constexpr int64_t metadata_bytes(int rows, int columns) {
  return int64_t(round_up(rows, Layout::kRowMultiple)) * round_up(columns, Layout::kColumnMultiple) / 8;
}

// Writes one byte. `index` counts the bytes of the padded matrix row by row. Padding becomes "the first two".
template <class Layout>
CUTLASS_HOST_DEVICE void pack_metadata_byte(uint8_t const* bitmask, uint8_t* metadata, int rows, int columns,
                                            Layout const& layout, int64_t index) {
  int const padded_bytes = round_up(columns, Layout::kColumnMultiple) / 8;
  int const row = int(index / padded_bytes), byte_column = int(index % padded_bytes);
  bool const inside = row < rows && byte_column < columns / 8;
  metadata[layout.offset(row, byte_column)] =
      metadata_byte(inside ? bitmask[int64_t(row) * (columns / 8) + byte_column] : 0x33);
}

}  // namespace ria
