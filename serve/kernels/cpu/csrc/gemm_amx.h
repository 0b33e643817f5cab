// The product with AMX, for bfloat16 activations. AMX multiplies dense tiles only, but so fast that it pays to write
// the zeros out: a block of the packed form, 16 rows x 32 columns, becomes a tile of 1 KiB in L1, and all tokens of the
// pass are multiplied by it. Memory still delivers 9 bits per weight.
//
//   tiles 0 to 3: sums of 2 x 16 tokens x 2 strips, float32
//   tiles 4 and 5: 16 tokens x 32 channels
//   tiles 6 and 7: the weights of a strip: 16 pairs of channels x 16 rows
//
// Blocks are expanded by the vector units while the matrix unit multiplies by those of the chunk before. A token's sums
// take its blocks of channels in order, each block by one instruction, which adds the products of a row in a fixed
// order. So a token's result depends neither on its batch nor on the number of threads.
//
// One or two tokens are not worth the zeros: AVX-512 multiplies them, with the same additions (FewTokensTraits).
//
// A zero that is written out would make NaN of an infinite activation. So tokens that are not finite are marked where
// they are packed, and multiplied by themselves.
#pragma once
#include "avx512_bf16.h"
#include "tile_configuration.h"

namespace {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kBlockTokens = 2 * kTileTokens;
constexpr int64_t kBlockColumns = 4 * kBlockGroups;
// Blocks of columns in a chunk: whole sections. Its tiles of weights stay in L1 for all tokens of the pass.
constexpr int64_t kAmxChunkBlocks = 8;
static_assert(kAmxChunkBlocks * kBlockColumns % 128 == 0, "a chunk holds whole sections");
// How many bytes ahead of what is expanded the weights are prefetched into L2: with one tile of tokens, and with more,
// whose first tiles go through the next chunk faster than it is used.
constexpr int64_t kAmxPrefetchBytes[] = {2304, 9216};

// How a pass lies in the panel: [tokens / 32][block of columns][token][32 channels], then a mark for each token. The
// channels of a group are in the order 2, 3, 0, 1. Up to
// 16 tokens are not padded, so that one token takes no more room than it needs; more are padded to whole tiles, with
// zeros.
struct AmxPanel {
  const Layout& layout;
  uint8_t* panel;
  int64_t tokens;
  explicit AmxPanel(const GemmArgs& args) : layout(args.layout), panel(args.panel), tokens(args.tokens) {}

  int64_t tile_tokens() const { return tokens < kTileTokens ? tokens : kTileTokens; }
  int64_t padded_tokens() const { return (tokens + tile_tokens() - 1) / tile_tokens() * tile_tokens(); }
  TokenBlocks blocks() const { return {tokens, kBlockTokens, kTileTokens}; }
  int64_t block_size(int64_t block) const {  // with padding
    const int64_t left = padded_tokens() - blocks().first(block), full = blocks().padded_size(block);
    return left < full ? left : full;
  }
  uint16_t* block(int64_t block) const {
    return reinterpret_cast<uint16_t*>(panel) + blocks().first(block) * layout.columns;
  }
  // The first of a token's channels; the next 32 ones are `stride` further.
  uint16_t* token(int64_t token, int64_t block, int64_t* stride) const {
    *stride = block_size(block) * kBlockColumns;
    return this->block(block) + (token - blocks().first(block)) * kBlockColumns;
  }
  int32_t* not_finite() const {  // [tokens]
    return reinterpret_cast<int32_t*>(reinterpret_cast<uint16_t*>(panel) + padded_tokens() * layout.columns);
  }
};

// For each of the 16 ways to keep two of four channels (a | b << 2), a row's selectors of the bytes of its two weights:
// bit 7 says that a byte of the channels 0 and 1 is zero, bit 1 which weight it belongs to; bits 6 and 0 are the same
// of the channels 2 and 3.
struct SelectorTable {
  alignas(kCacheLine) uint32_t rows[16] = {};
  constexpr SelectorTable() {
    for (int i = 0; i < 16; ++i) {
      const int kept[2] = {i & 3, i >> 2};
      for (int channel = 0; channel < 4; ++channel) {
        const int which = channel == kept[0] ? 0 : channel == kept[1] ? 1 : -1;
        const uint32_t bits = which < 0 ? 0x40u : static_cast<uint32_t>(which);
        for (int byte = 0; byte < 2; ++byte)
          rows[i] |= (channel < 2 ? bits << 1 : bits) << 8 * (channel % 2 * 2 + byte);
      }
    }
  }
};
constexpr SelectorTable kSelectorTable;

// Writes the two rows of a tile that a strip and group become: their channels 2 and 3, then 0 and 1. `kept`: a | b << 2
// in the low four bits of each row's 32.
[[gnu::always_inline]] inline void expand_group(__m512i weights, __m512i kept, uint8_t* to) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0x82));
  const __m512i bytes = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
  const __m512i table = _mm512_load_si512(kSelectorTable.rows);
  const __m512i both = _mm512_permutexvar_epi32(kept, table);
  const __m512i low = _mm512_ternarylogic_epi32(both, mask, bytes, 0xea);  // (both & mask) | bytes
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_slli_epi32(both, 1), mask, bytes, 0xea);
  _mm512_store_si512(to, _mm512_shuffle_epi8(weights, high));
  _mm512_store_si512(to + kCacheLine, _mm512_shuffle_epi8(weights, low));
}

// What `expand_group` takes, of one group of a block.
template <class VecTraits, int kGroup>
[[gnu::always_inline]] inline __m512i kept_channels(const uint8_t* block, int64_t strips, int64_t strip) {
  if constexpr (VecTraits::kDtype == Dtype::int4) {
    // Words: the lowest two bits of each are a position.
    const __m512i words =
        VecTraits::template int4_positions<kGroup>(block + strip * kBlockGroups * (kStripRows + kPositionBytes));
    return _mm512_ternarylogic_epi32(words, _mm512_srli_epi32(words, 14), _mm512_set1_epi32(3), 0xe4);
  } else {
    constexpr int64_t value_bytes = kStripRows * pair_bytes(VecTraits::kDtype);
    const uint8_t* positions = block + kBlockGroups * strips * value_bytes + (kGroup * strips + strip) * kPositionBytes;
    // Two broadcasts from memory, which take no shuffle.
    const __m512i lower = _mm512_broadcastd_epi32(_mm_loadu_si32(positions));
    return _mm512_srlv_epi32(_mm512_mask_broadcastd_epi32(lower, 0xff00, _mm_loadu_si32(positions + 4)),
                             _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  }
}

template <class VecTraits, int kGroup>
[[gnu::always_inline]] inline __m512i weights_of(const uint8_t* block, int64_t strips, int64_t strip) {
  constexpr int64_t value_bytes = kStripRows * pair_bytes(VecTraits::kDtype);
  if constexpr (VecTraits::kDtype == Dtype::int4)
    return VecTraits::template int4_weights<kGroup>(block + strip * kBlockGroups * (value_bytes + kPositionBytes));
  else
    return VecTraits::weights(block + (kGroup * strips + strip) * value_bytes);
}

// Expands the groups from kFirst on of a block of S strips to [strip][tile].
template <class VecTraits, int S, int T, int kFirst, size_t... kGroups>
[[gnu::always_inline]] inline void expand_groups(const uint8_t* block, uint8_t* to, std::index_sequence<kGroups...>) {
  constexpr int64_t lines =
      S * kBlockGroups * (kStripRows * pair_bytes(VecTraits::kDtype) + kPositionBytes) / kCacheLine;
  const auto expand = [&](auto group) __attribute__((always_inline)) {
    for (int64_t line = group * lines / kBlockGroups; line < (group + 1) * lines / kBlockGroups; ++line)
      __builtin_prefetch(block + kAmxPrefetchBytes[T - 1] + line * kCacheLine, 0, 2);
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s)
      expand_group(weights_of<VecTraits, group>(block, S, s), kept_channels<VecTraits, group>(block, S, s),
                   to + s * kTileBytes + group * 2 * kCacheLine);
  };
  (expand(std::integral_constant<int, kFirst + static_cast<int>(kGroups)>()), ...);
}

// A chunk of a tile of S strips, expanded.
template <int S>
struct AmxChunk {
  alignas(kCacheLine) uint8_t tiles[kAmxChunkBlocks][S * kTileBytes];
  alignas(kCacheLine) float scales[kAmxChunkBlocks][S * kStripRows];  // of each section
};

// Where the packed form of a chunk is.
struct ChunkSource {
  const uint8_t* weights = nullptr;
  int64_t blocks = 0;
};

template <class VecTraits, int S>
struct AmxTile {  // a tile of S strips, block by block
  static constexpr int64_t block_bytes =
      S * kBlockGroups * (kStripRows * pair_bytes(VecTraits::kDtype) + kPositionBytes);

  // Where a block of a chunk is.
  static const uint8_t* block(const Layout& layout, const uint8_t* chunk, int64_t block) {
    if constexpr (VecTraits::kGrouped)
      return chunk + layout.block_offset(block, S);
    else
      return chunk + block * block_bytes;
  }
  // Expands the part kPart of kParts of a block.
  template <int kPart, int kParts, int T = 1>
  [[gnu::always_inline]] static void expand(const uint8_t* block, uint8_t* to) {
    constexpr int count = static_cast<int>(kBlockGroups) / kParts;
    expand_groups<VecTraits, S, T, kPart * count>(block, to, std::make_index_sequence<count>());
  }
  static void expand_scales(const Layout& layout, const ChunkSource& source, AmxChunk<S>& to) {
    if constexpr (VecTraits::kGrouped)
      for (int64_t section = 0; section * layout.section_blocks() < source.blocks; ++section)
        for (int s = 0; s < S; ++s)
          VecTraits::store(to.scales[section] + s * kStripRows,
                           VecTraits::load_scales(source.weights + layout.section_scales_offset(section, S) +
                                                      s * layout.strip_scale_bytes(),
                                                  layout.scale_dtype));
  }
  [[gnu::noinline]] static void expand_all(const Layout& layout, const ChunkSource& source, AmxChunk<S>& to) {
    for (int64_t b = 0; b < source.blocks; ++b) expand<0, 1>(block(layout, source.weights, b), to.tiles[b]);
    expand_scales(layout, source, to);
  }
};

template <int T, int S>
[[gnu::always_inline]] inline void load_tile_sums(const float* sums) {
  constexpr int64_t stride = kTileRows * sizeof(float);
  _tile_loadd(0, sums, stride);
  if constexpr (S == 2) _tile_loadd(1, sums + kStripRows, stride);
  if constexpr (T == 2) _tile_loadd(2, sums + kTileTokens * kTileRows, stride);
  if constexpr (T == 2 && S == 2) _tile_loadd(3, sums + kTileTokens * kTileRows + kStripRows, stride);
}
template <int T, int S>
[[gnu::always_inline]] inline void store_tile_sums(float* sums) {
  constexpr int64_t stride = kTileRows * sizeof(float);
  _tile_stored(0, sums, stride);
  if constexpr (S == 2) _tile_stored(1, sums + kStripRows, stride);
  if constexpr (T == 2) _tile_stored(2, sums + kTileTokens * kTileRows, stride);
  if constexpr (T == 2 && S == 2) _tile_stored(3, sums + kTileTokens * kTileRows + kStripRows, stride);
}
template <int T, int S>
[[gnu::always_inline]] inline void zero_tile_sums() {
  _tile_zero(0);
  if constexpr (S == 2) _tile_zero(1);
  if constexpr (T == 2) _tile_zero(2);
  if constexpr (T == 2 && S == 2) _tile_zero(3);
}

// The sums += T x 16 tokens, each tile of them `tile_bytes` long and `row_bytes` a token, times an expanded block.
template <int T, int S>
[[gnu::always_inline]] inline void multiply_block(const uint8_t* tokens, int64_t row_bytes, const uint8_t* weights) {
  _tile_loadd(6, weights, kCacheLine);
  _tile_loadd(4, tokens, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (S == 2) {
    _tile_loadd(7, weights + kTileBytes, kCacheLine);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (T == 2) {
    _tile_loadd(5, tokens + kTileBytes, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (S == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// sums += the products of a section, times its scales.
template <int S>
void add_scaled_sums(const float* products, const float* scales, int64_t tokens, float* sums) {
  for (int64_t t = 0; t < tokens; ++t, sums += kTileRows, products += kTileRows)
#pragma GCC unroll 2
    for (int s = 0; s < S * kStripRows; s += kStripRows)
      _mm512_store_ps(sums + s, _mm512_fmadd_ps(_mm512_load_ps(products + s), _mm512_load_ps(scales + s),
                                                _mm512_load_ps(sums + s)));
}

// One token block and chunk.
template <int S>
struct BlockJob {
  const Layout& layout;
  const uint8_t* tokens;  // of this chunk
  int64_t size;
  const AmxChunk<S>& chunk;
  int64_t blocks;
  ChunkSource next_source;  // of the chunk that is expanded meanwhile
  AmxChunk<S>& next;
};

// sums += the product of T x 16 tokens and a chunk. Meanwhile expands the part kPart of each block of the next one, if
// there are kParts parts, or nothing if there are none.
template <class VecTraits, int S, int T, int kParts, int kPart>
void accumulate_block(const BlockJob<S>& job, float* sums) {
  using Tile = AmxTile<VecTraits, S>;
  alignas(kCacheLine) float products[VecTraits::kGrouped ? T * kTileTokens * kTileRows : 1];
  const int64_t section_blocks = VecTraits::kGrouped ? job.layout.section_blocks() : job.blocks;
  const int64_t next_blocks = kParts == 0 ? 0 : job.next_source.blocks;
  const int64_t stride = job.size * kBlockColumns * static_cast<int64_t>(sizeof(uint16_t));
  const uint8_t* tokens = job.tokens;
  if constexpr (!VecTraits::kGrouped) load_tile_sums<T, S>(sums);
  for (int64_t b = 0; b < job.blocks; ++b, tokens += stride) {
    if constexpr (VecTraits::kGrouped)
      if (b % section_blocks == 0) zero_tile_sums<T, S>();
    multiply_block<T, S>(tokens, kCacheLine, job.chunk.tiles[b]);
    if constexpr (kParts > 0)
      if (b < next_blocks)
        Tile::template expand<kPart, kParts, T>(Tile::block(job.layout, job.next_source.weights, b), job.next.tiles[b]);
    if constexpr (VecTraits::kGrouped)
      if ((b + 1) % section_blocks == 0) {
        store_tile_sums<T, S>(products);
        tile_barrier();
        add_scaled_sums<S>(products, job.chunk.scales[b / section_blocks], job.size, sums);
        tile_barrier();
      }
  }
  if constexpr (kParts > 0)
    for (int64_t b = job.blocks; b < next_blocks; ++b)
      Tile::template expand<kPart, kParts, T>(Tile::block(job.layout, job.next_source.weights, b), job.next.tiles[b]);
  if constexpr (!VecTraits::kGrouped) store_tile_sums<T, S>(sums);
}

template <int S>
using AccumulateBlock = void (*)(const BlockJob<S>&, float*);

// `part` of `parts`: 1, 2 or 4 parts; none if `part` is beyond them.
template <class VecTraits, int S, int T>
AccumulateBlock<S> accumulate_block_for(int64_t parts, int64_t part) {
  static constexpr AccumulateBlock<S> table[] = {
      accumulate_block<VecTraits, S, T, 1, 0>, accumulate_block<VecTraits, S, T, 2, 0>,
      accumulate_block<VecTraits, S, T, 2, 1>, accumulate_block<VecTraits, S, T, 4, 0>,
      accumulate_block<VecTraits, S, T, 4, 1>, accumulate_block<VecTraits, S, T, 4, 2>,
      accumulate_block<VecTraits, S, T, 4, 3>};
  return part < parts ? table[parts - 1 + part] : accumulate_block<VecTraits, S, T, 0, 0>;
}

// The product of a token that is not finite: its channels that are, as for any token, and then the others, with the
// weights that are kept.
template <class VecTraits, int S>
void multiply_not_finite(const GemmArgs& args, int64_t tile, const AmxPanel& panel, int64_t token, int64_t token_block,
                         float* sums) {
  const Layout& layout = args.layout;
  const uint8_t* weights = args.packed + layout.tile_offset(tile);
  alignas(kCacheLine) uint8_t expanded[S * kTileBytes], kept[S * kTileBytes];
  alignas(kCacheLine) uint16_t finite[kBlockColumns];
  alignas(kCacheLine) float products[kTileTokens * kTileRows] = {}, scales[kTileRows], other[kTileRows] = {};
  const int64_t rows = panel.tile_tokens();
  int64_t stride;
  const uint16_t* x = panel.token(token, token_block, &stride);
  if constexpr (!VecTraits::kGrouped)
    for (int64_t t = 0; t < rows; ++t) std::memcpy(products + t * kTileRows, sums, sizeof scales);
  for (int64_t b = 0; b < layout.blocks(); ++b, x += stride) {
    const uint8_t* block = weights + layout.block_offset(b, S);
    AmxTile<VecTraits, S>::template expand<0, 1>(block, expanded);
    bool all_finite = true;
    for (int64_t c = 0; c < kBlockColumns; ++c) {
      const bool is_finite = (x[c] & 0x7f80) != 0x7f80;
      finite[c] = is_finite ? x[c] : 0;
      all_finite = all_finite && is_finite;
    }
    tile_barrier();
    load_tile_sums<1, S>(products);
    multiply_block<1, S>(reinterpret_cast<const uint8_t*>(finite), 0, expanded);  // the same token in every row
    store_tile_sums<1, S>(products);
    tile_barrier();
    if (!all_finite) {
      for_each_group(
          [&](auto group) __attribute__((always_inline)) {
            for (int s = 0; s < S; ++s)
              expand_group(_mm512_set1_epi16(1), kept_channels<VecTraits, group>(block, S, s),
                           kept + s * kTileBytes + group * 2 * kCacheLine);
          },
          kGroupsOfBlock);
      for (int64_t c = 0; c < kBlockColumns; ++c) {
        if (finite[c] == x[c]) continue;
        for (int64_t r = 0; r < S * kStripRows; ++r) {
          const int64_t at = r / kStripRows * kTileBytes + c / 2 * kCacheLine + (r % kStripRows * 2 + c % 2) * 2;
          uint16_t is_kept;
          Bfloat16 weight;
          std::memcpy(&is_kept, kept + at, sizeof is_kept);
          std::memcpy(&weight, expanded + at, sizeof weight);
          if (is_kept) other[r] += weight.to_float() * Bfloat16{x[c]}.to_float();
        }
      }
    }
    if constexpr (VecTraits::kGrouped)
      if ((b + 1) % layout.section_blocks() == 0) {
        for (int s = 0; s < S; ++s)
          VecTraits::store(
              scales + s * kStripRows,
              VecTraits::load_scales(weights + layout.section_scales_offset(b / layout.section_blocks(), S) +
                                         s * layout.strip_scale_bytes(),
                                     layout.scale_dtype));
        for (int64_t r = 0; r < S * kStripRows; ++r) products[r] += other[r];
        add_scaled_sums<S>(products, scales, 1, sums);
        std::memset(products, 0, sizeof products);
        std::memset(other, 0, sizeof other);
      }
  }
  if constexpr (!VecTraits::kGrouped)
    for (int64_t r = 0; r < S * kStripRows; ++r) sums[r] = products[r] + other[r];
}

// Multiplies some tiles of S strips, chunk by chunk.
template <class VecTraits, int S>
void multiply_tiles_of(const GemmArgs& args, int64_t begin, int64_t end) {
  alignas(kCacheLine) float sums[kMaxPassTokens * kTileRows];
  AmxChunk<S> chunks[2];
  const Layout& layout = args.layout;
  const AmxPanel panel(args);
  const TokenBlocks blocks = panel.blocks();
  const int64_t chunks_of_tile = (layout.blocks() + kAmxChunkBlocks - 1) / kAmxChunkBlocks;
  const int64_t parts = blocks.count >= 4 ? 4 : blocks.count >= 2 ? 2 : 1;
  bool all_finite = true;
  for (int64_t t = 0; t < args.tokens; ++t) all_finite = all_finite && panel.not_finite()[t] == 0;

  const auto source = [&](int64_t tile, int64_t chunk) -> ChunkSource {
    if (chunk == chunks_of_tile) ++tile, chunk = 0;
    if (tile == end) return {};
    const int64_t first = chunk * kAmxChunkBlocks, left = layout.blocks() - first;
    return {args.packed + layout.tile_offset(tile) + layout.block_offset(first, S),
            left < kAmxChunkBlocks ? left : kAmxChunkBlocks};
  };
  if (begin < end) AmxTile<VecTraits, S>::expand_all(layout, source(begin, 0), chunks[0]);
  int turn = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Epilogue<VecTraits> epilogue(args, tile);
    for (int64_t t = 0; t < args.tokens; ++t)
      std::memcpy(sums + t * kTileRows, epilogue.initial, sizeof epilogue.initial);
    for (int64_t chunk = 0; chunk < chunks_of_tile; ++chunk, turn ^= 1) {
      const ChunkSource next = source(tile, chunk + 1);
      AmxTile<VecTraits, S>::expand_scales(layout, next, chunks[turn ^ 1]);
      tile_barrier();
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t size = panel.block_size(b), first = chunk * kAmxChunkBlocks;
        const BlockJob<S> job = {layout,
                                 reinterpret_cast<const uint8_t*>(panel.block(b) + first * kBlockColumns * size),
                                 size,
                                 chunks[turn],
                                 source(tile, chunk).blocks,
                                 next,
                                 chunks[turn ^ 1]};
        const auto accumulate = size > kTileTokens ? accumulate_block_for<VecTraits, S, 2>(parts, b)
                                                   : accumulate_block_for<VecTraits, S, 1>(parts, b);
        accumulate(job, sums + blocks.first(b) * kTileRows);
      }
    }
    tile_barrier();
    if (!all_finite)
      for (int64_t b = 0; b < blocks.count; ++b)
        for (int64_t t = blocks.first(b); t < blocks.first(b) + blocks.size(b); ++t)
          if (panel.not_finite()[t]) {
            std::memcpy(sums + t * kTileRows, epilogue.initial, sizeof epilogue.initial);
            multiply_not_finite<VecTraits, S>(args, tile, panel, t, b, sums + t * kTileRows);
          }
    epilogue.apply(sums, 0, args.tokens);
  }
}

template <class VecTraits>
void multiply_amx_tiles(const GemmArgs& args, int64_t begin, int64_t end) {
  const TileConfiguration configuration(AmxPanel(args).tile_tokens());
  int64_t whole = end;
  if (begin < end && args.layout.strips_in(end - 1) < kTileStrips) --whole;
  multiply_tiles_of<VecTraits, kTileStrips>(args, begin, whole);
  multiply_tiles_of<VecTraits, 1>(args, whole, end);
}

// Copies the tokens of some token blocks to the panel, with their channels in the order of the weight's columns, and
// marks those that are not finite.
inline void pack_amx_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  const AmxPanel panel(args);
  const TokenBlocks blocks = panel.blocks();
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = blocks.first(b);
    int64_t stride;
    for (int64_t t = first; t < first + panel.block_size(b); ++t) {
      uint16_t* to = panel.token(t, b, &stride);
      if (t >= args.tokens) {
        for (int64_t c = 0; c < args.layout.columns; c += kBlockColumns, to += stride)
          _mm512_storeu_si512(to, _mm512_setzero_si512());
        continue;
      }
      const uint16_t* x = static_cast<const uint16_t*>(args.x) + (args.x_rows ? args.x_rows[t] : t) * args.x_stride;
      __mmask32 not_finite = 0;
      for (int64_t c = 0; c < args.layout.columns; c += kBlockColumns, to += stride) {
        __m512i channels;
        if (args.permutation) {
          alignas(kCacheLine) uint16_t permuted[kBlockColumns];
          for (int64_t i = 0; i < kBlockColumns; ++i) permuted[i] = x[args.permutation[c + i]];
          channels = _mm512_load_si512(permuted);
        } else {
          channels = _mm512_loadu_si512(x + c);
        }
        not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(channels, exponent), exponent);
        _mm512_storeu_si512(to, _mm512_rol_epi64(channels, 32));
      }
      panel.not_finite()[t] = not_finite != 0;
    }
  }
}

// Few tokens by gemm_rows.h, with the additions of `tdpbf16ps`: it adds the products of a block's even channels and
// those of its odd ones, each with one rounding, in the order of the tile's rows; then both sums, and then the result
// to the sum so far. vdpbf16ps does the same with the pairs of two vectors of activations, of which one has zeros for
// the odd channels and one for the even ones. Of a pair it takes the second first: that is why the channels of a group
// are in the order 2, 3, 0, 1.
template <Dtype kType, bool kGroups = false>
struct FewTokensTraits : Avx512Bf16Traits<kType, kGroups> {
  using Base = Avx512Bf16Traits<kType, kGroups>;
  using Value = typename Base::Value;
  struct Accumulators { __m512 sums{}, even{}, odd{}; };
  struct Activations { __m512i even, odd; };
  static constexpr int64_t kTokensWithSums = 2;
  static constexpr int64_t kBlockTokens = 2;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr bool kSumsBlocks = true;

  static void store_channels(uint8_t* panel, Value a, Value b, Value c, Value d) {
    const uint64_t halves[2] = {a.bits | static_cast<uint64_t>(c.bits) << 32,
                                static_cast<uint64_t>(b.bits) << 16 | static_cast<uint64_t>(d.bits) << 48};
    std::memcpy(panel, halves, sizeof halves);
  }
  static Activations broadcast(const uint8_t* p) { return {Base::broadcast(p), Base::broadcast(p + 8)}; }
  static Accumulators load(const float* p) { return {Base::load(p)}; }
  static void store(float* p, const Accumulators& acc) { Base::store(p, acc.sums); }
  static Accumulators multiply_add(const Accumulators& acc, __m512i w, __m512i p, const Activations& x) {
    return {acc.sums, Base::multiply_add(acc.even, w, p, x.even), Base::multiply_add(acc.odd, w, p, x.odd)};
  }
  static Accumulators add_block(const Accumulators& acc) {
    return {_mm512_add_ps(acc.sums, _mm512_add_ps(acc.even, acc.odd))};
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) { return {Base::load_scales(p, dtype)}; }
  static Accumulators scaled(const Accumulators& acc, const Accumulators& scales, const Accumulators& initial) {
    return {Base::scaled(acc.sums, scales.sums, initial.sums)};
  }
};

template <Dtype kType, bool kGroups = false>
constexpr Kernels amx_kernels() {
  using VecTraits = Avx512Bf16Traits<kType, kGroups>;
  using FewTokens = FewTokensTraits<kType, kGroups>;
  return {row_kernel<FewTokens>(),
          FewTokens::kBlockTokens + 1,
          {kBlockTokens, kTileTokens, kBlockTokens, 4 * sizeof(uint16_t), pack_amx_tokens,
           multiply_amx_tiles<VecTraits>, round_values<VecTraits>, sizeof(int32_t)}};
}

}  // namespace
