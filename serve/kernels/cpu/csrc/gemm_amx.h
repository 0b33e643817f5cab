// The product with AMX, written once over an `Operands` type that names the dtypes. AMX multiplies dense tiles only,
// but so fast that it pays to write the zeros out: 16 rows of the packed form and 64 bytes of channels become a tile of
// 1 KiB in L1, and all tokens of the pass are multiplied by it. Memory still delivers the packed form.
//
//   tiles 0 to 3: sums of 2 x 16 tokens x 2 strips
//   tiles 4 and 5: 16 tokens x 64 bytes of channels
//   tiles 6 and 7: the weights of a strip: 16 x 4 bytes of channels x 16 rows
//
// A step is what one such instruction takes of the columns. Weights are expanded by the vector units while the matrix
// unit multiplies by those of the chunk before. A token's sums take its steps in order, and one instruction adds the
// products of a step in a fixed order. So a token's result depends neither on its batch nor on the number of threads.
//
// Scales of groups multiply the products of a section of columns, which leave the tiles for that: vectors scale one
// section and add it to the sums while the matrix unit multiplies by the next one.
//
//   struct Operands {
//     using Product;                                                   // in a tile: float or int32_t
//     using Sum;                                                       // float if kGrouped, else as Product
//     static constexpr Dtype kDtype;                                   // of the weights
//     static constexpr bool kGrouped;                                  // scales belong to groups of columns
//     static constexpr int64_t kStepBlocks;                            // blocks of the packed form in a step
//     template <int S, int T, int kPart, int kParts>
//     static void expand(const Layout&, const ChunkSource&, int64_t step, uint8_t* to);
//     static void multiply_00(), multiply_01(), multiply_10(), multiply_11();  // sums of tokens and strip 0 or 1
//     static void load_scales(const Layout&, const uint8_t*, float*);  // of 16 rows; this and `scaled` if kGrouped
//     static __m512 scaled(const Product*, __m512 scales, __m512 sums);  // sums + 16 products * scales
//     class Tile {                                                     // of a pass
//       Tile(const GemmArgs&, int64_t tile);
//       const Sum* initial() const;                                    // [kTileRows], of every token
//       template <int S> void finish(const AmxPanel&, Sum* sums);      // to y
//     };
//   };
#pragma once
#include "kernels.h"
#include "prefetch_output.h"
#include "tile_configuration.h"

namespace {

using namespace ria;

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kAmxBlockTokens = 2 * kTileTokens;
constexpr int64_t kStepBytes = 64;  // of a token's channels
// Two token blocks hide the expansion of the weights. More of long tokens would not stay in the L2 cache.
constexpr int64_t kMinPassTokens = 2 * kAmxBlockTokens;
// Steps in a chunk: whole sections. Its tiles of weights stay in L1 for all tokens of the pass.
constexpr int64_t kChunkSteps = 4;
// How many bytes ahead of what is expanded the weights are prefetched into L2: with one tile of tokens, and with more,
// whose first tiles go through the next chunk faster than it is used.
constexpr int64_t kAmxPrefetchBytes[] = {2304, 9216};

// How a pass lies in the panel: [tokens / 32][step][token][64 bytes], then four bytes for each token. Up to 16 tokens
// are not padded, so that one token takes no more room than it needs; more are padded to whole tiles, with zeros.
struct AmxPanel {
  uint8_t* panel;
  int64_t steps, tokens;
  AmxPanel(const GemmArgs& args, int64_t step_columns)
      : panel(args.panel), steps(args.layout.columns / step_columns), tokens(args.tokens) {}

  int64_t tile_tokens() const { return tokens < kTileTokens ? tokens : kTileTokens; }
  int64_t padded_tokens() const { return (tokens + tile_tokens() - 1) / tile_tokens() * tile_tokens(); }
  TokenBlocks blocks() const { return {tokens, kAmxBlockTokens, kTileTokens}; }
  int64_t block_size(int64_t block) const {  // with padding
    const int64_t left = padded_tokens() - blocks().first(block), full = blocks().padded_size(block);
    return left < full ? left : full;
  }
  uint8_t* block(int64_t block, int64_t step) const {
    return panel + (blocks().first(block) * steps + step * block_size(block)) * kStepBytes;
  }
  // A token's bytes of the first step; those of the next one are so many further.
  uint8_t* token(int64_t token, int64_t block) const {
    return this->block(block, 0) + (token - blocks().first(block)) * kStepBytes;
  }
  int64_t step_stride(int64_t block) const { return block_size(block) * kStepBytes; }
  uint8_t* of_tokens() const { return panel + padded_tokens() * steps * kStepBytes; }  // [tokens][4]
};

// A chunk of a tile of S strips, expanded.
template <int S>
struct AmxChunk {
  alignas(kCacheLine) uint8_t tiles[kChunkSteps][S * kTileBytes];
  alignas(kCacheLine) float scales[kChunkSteps][S * kStripRows];  // of each section
};

// Where the packed form of a chunk is.
struct ChunkSource {
  const uint8_t *weights = nullptr, *multipliers = nullptr;
  int64_t steps = 0;
};

template <class Operands, int S>
struct AmxTile {  // a tile of S strips, step by step
  static constexpr int64_t step_bytes =
      Operands::kStepBlocks * S * kBlockGroups * (kStripRows * pair_bytes(Operands::kDtype) + kPositionBytes);

  static const uint8_t* step(const Layout& layout, const uint8_t* chunk, int64_t step) {
    if constexpr (Operands::kGrouped)
      return chunk + layout.block_offset(step * Operands::kStepBlocks, S);
    else
      return chunk + step * step_bytes;
  }
  static int64_t section_steps(const Layout& layout) { return layout.section_blocks() / Operands::kStepBlocks; }
  static void load_scales(const Layout& layout, const uint8_t* weights, int64_t section, float* to) {
    for (int s = 0; s < S; ++s)
      Operands::load_scales(layout, weights + layout.section_scales_offset(section, S) + s * layout.strip_scale_bytes(),
                            to + s * kStripRows);
  }
  static void expand_scales(const Layout& layout, const ChunkSource& source, AmxChunk<S>& to) {
    if constexpr (Operands::kGrouped)
      for (int64_t section = 0; section * section_steps(layout) < source.steps; ++section)
        load_scales(layout, source.weights, section, to.scales[section]);
  }
  [[gnu::noinline]] static void expand_all(const Layout& layout, const ChunkSource& source, AmxChunk<S>& to) {
    for (int64_t i = 0; i < source.steps; ++i) Operands::template expand<S, 1, 0, 1>(layout, source, i, to.tiles[i]);
    expand_scales(layout, source, to);
  }
};

template <int T, int S>
[[gnu::always_inline]] inline void load_tile_sums(const void* from) {
  constexpr int64_t stride = kTileRows * 4, strip = kStripRows * 4;
  const uint8_t* sums = static_cast<const uint8_t*>(from);
  _tile_loadd(0, sums, stride);
  if constexpr (S == 2) _tile_loadd(1, sums + strip, stride);
  if constexpr (T == 2) _tile_loadd(2, sums + kTileTokens * stride, stride);
  if constexpr (T == 2 && S == 2) _tile_loadd(3, sums + kTileTokens * stride + strip, stride);
}
template <int T, int S>
[[gnu::always_inline]] inline void store_tile_sums(void* to) {
  constexpr int64_t stride = kTileRows * 4, strip = kStripRows * 4;
  uint8_t* sums = static_cast<uint8_t*>(to);
  _tile_stored(0, sums, stride);
  if constexpr (S == 2) _tile_stored(1, sums + strip, stride);
  if constexpr (T == 2) _tile_stored(2, sums + kTileTokens * stride, stride);
  if constexpr (T == 2 && S == 2) _tile_stored(3, sums + kTileTokens * stride + strip, stride);
}
template <int T, int S>
[[gnu::always_inline]] inline void zero_tile_sums() {
  _tile_zero(0);
  if constexpr (S == 2) _tile_zero(1);
  if constexpr (T == 2) _tile_zero(2);
  if constexpr (T == 2 && S == 2) _tile_zero(3);
}

// The sums += T x 16 tokens, `row_bytes` from one token to the next, times an expanded step.
template <class Operands, int T, int S>
[[gnu::always_inline]] inline void multiply_step(const uint8_t* tokens, int64_t row_bytes, const uint8_t* weights) {
  _tile_loadd(6, weights, kCacheLine);
  _tile_loadd(4, tokens, row_bytes);
  Operands::multiply_00();
  if constexpr (S == 2) {
    _tile_loadd(7, weights + kTileBytes, kCacheLine);
    Operands::multiply_01();
  }
  if constexpr (T == 2) {
    _tile_loadd(5, tokens + kTileBytes, row_bytes);
    Operands::multiply_10();
    if constexpr (S == 2) Operands::multiply_11();
  }
}

// sums += the products of a section, times its scales, for the tokens [first, last).
template <class Operands, int S>
[[gnu::always_inline]] inline void add_scaled(const typename Operands::Product* products, const float* scales,
                                              int64_t first, int64_t last, float* sums) {
  __m512 of_strips[S];
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s) of_strips[s] = _mm512_load_ps(scales + s * kStripRows);
  for (int64_t t = first; t < last; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      const int64_t at = t * kTileRows + s * kStripRows;
      _mm512_store_ps(sums + at, Operands::scaled(products + at, of_strips[s], _mm512_load_ps(sums + at)));
    }
}

// The products of a section that have left the tiles. They are scaled and added to the sums of their tokens little by
// little, while the next section is multiplied.
template <class Operands, int S>
class PendingSection {
 public:
  using Product = typename Operands::Product;

  // Where the next section's products go. `set` then says whose they are.
  Product* products() { return products_[turn_ ^ 1]; }
  void set(int64_t tokens, const float* scales, float* sums) {
    turn_ ^= 1;
    left_ = tokens;
    scales_ = scales;
    sums_ = sums;
  }
  int64_t left() const { return left_; }  // tokens
  [[gnu::always_inline]] void add(int64_t tokens) {
    if (left_ == 0) return;
    const int64_t rest = tokens < left_ ? left_ - tokens : 0;
    add_scaled<Operands, S>(products_[turn_], scales_, rest, left_, sums_);
    left_ = rest;
  }

 private:
  alignas(kCacheLine) Product products_[2][Operands::kGrouped ? kAmxBlockTokens * kTileRows : 1];
  int turn_ = 0;
  int64_t left_ = 0;
  const float* scales_ = nullptr;
  float* sums_ = nullptr;
};

// One token block and chunk.
template <int S>
struct BlockJob {
  const Layout& layout;
  const uint8_t* tokens;  // of this chunk
  int64_t size;
  const AmxChunk<S>& chunk;
  int64_t steps;
  ChunkSource next_source;  // of the chunk that is expanded meanwhile
  AmxChunk<S>& next;
};

// sums += the product of T x 16 tokens and a chunk, the last section of which is left pending. Meanwhile expands the
// part kPart of each step of the next one, if there are kParts parts, or nothing if there are none.
template <class Operands, int S, int T, int kParts, int kPart>
void accumulate_block(const BlockJob<S>& job, typename Operands::Sum* sums, PendingSection<Operands, S>& pending) {
  using Tile = AmxTile<Operands, S>;
  const int64_t section_steps = Operands::kGrouped ? Tile::section_steps(job.layout) : 0;
  const int64_t next_steps = kParts == 0 ? 0 : job.next_source.steps;
  const uint8_t* tokens = job.tokens;
  const auto expand = [&](int64_t step) __attribute__((always_inline)) {
    if constexpr (kParts > 0)
      Operands::template expand<S, T, kPart, kParts>(job.layout, job.next_source, step, job.next.tiles[step]);
  };
  if constexpr (!Operands::kGrouped) load_tile_sums<T, S>(sums);
  int64_t left = 0, section = 0, share = 0;  // steps of the section; tokens of the pending one for each
  for (int64_t step = 0; step < job.steps; ++step, tokens += job.size * kStepBytes) {
    if constexpr (Operands::kGrouped)
      if (left == 0) {
        zero_tile_sums<T, S>();
        left = section_steps;
        share = (pending.left() + section_steps - 1) / section_steps;
      }
    multiply_step<Operands, T, S>(tokens, kStepBytes, job.chunk.tiles[step]);
    if constexpr (Operands::kGrouped) {
      pending.add(share);
      if (--left == 0) {
        tile_barrier();
        store_tile_sums<T, S>(pending.products());
        tile_barrier();
        pending.set(job.size, job.chunk.scales[section++], sums);
      }
    }
    if (step < next_steps) expand(step);
  }
  for (int64_t step = job.steps; step < next_steps; ++step) expand(step);
  if constexpr (!Operands::kGrouped) store_tile_sums<T, S>(sums);
}

template <class Operands, int S>
using AccumulateBlock = void (*)(const BlockJob<S>&, typename Operands::Sum*, PendingSection<Operands, S>&);

// `part` of `parts`: 1, 2 or 4 parts; none if `part` is beyond them.
template <class Operands, int S, int T>
AccumulateBlock<Operands, S> accumulate_block_for(int64_t parts, int64_t part) {
  static constexpr AccumulateBlock<Operands, S> table[] = {
      accumulate_block<Operands, S, T, 1, 0>, accumulate_block<Operands, S, T, 2, 0>,
      accumulate_block<Operands, S, T, 2, 1>, accumulate_block<Operands, S, T, 4, 0>,
      accumulate_block<Operands, S, T, 4, 1>, accumulate_block<Operands, S, T, 4, 2>,
      accumulate_block<Operands, S, T, 4, 3>};
  return part < parts ? table[parts - 1 + part] : accumulate_block<Operands, S, T, 0, 0>;
}

// Multiplies some tiles of S strips, chunk by chunk.
template <class Operands, int S>
void multiply_tiles_of(const GemmArgs& args, const AmxPanel& panel, int64_t begin, int64_t end) {
  if (begin == end) return;
  alignas(kCacheLine) typename Operands::Sum sums[kMaxPassTokens * kTileRows];
  AmxChunk<S> chunks[2];
  PendingSection<Operands, S> pending;
  const Layout& layout = args.layout;
  const TokenBlocks blocks = panel.blocks();
  const int64_t chunks_of_tile = (panel.steps + kChunkSteps - 1) / kChunkSteps;
  const int64_t parts = blocks.count >= 4 ? 4 : blocks.count >= 2 ? 2 : 1;

  const auto source = [&](int64_t tile, int64_t chunk) -> ChunkSource {
    if (chunk == chunks_of_tile) ++tile, chunk = 0;
    if (tile == end) return {};
    const int64_t first = chunk * kChunkSteps, left = panel.steps - first;
    const uint8_t* packed = args.packed + layout.tile_offset(tile);
    return {packed + layout.block_offset(first * Operands::kStepBlocks, S),
            packed + first * Operands::kStepBlocks * kMultiplierBytes, left < kChunkSteps ? left : kChunkSteps};
  };
  AmxTile<Operands, S>::expand_all(layout, source(begin, 0), chunks[0]);
  int turn = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    typename Operands::Tile finisher(args, tile);
    for (int64_t t = 0; t < args.tokens; ++t)
      std::memcpy(sums + t * kTileRows, finisher.initial(), kTileRows * sizeof *sums);
    for (int64_t chunk = 0; chunk < chunks_of_tile; ++chunk, turn ^= 1) {
      const ChunkSource next = source(tile, chunk + 1);
      AmxTile<Operands, S>::expand_scales(layout, next, chunks[turn ^ 1]);
      tile_barrier();
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t size = panel.block_size(b), tokens = blocks.size(b), first = blocks.first(b);
        prefetch_output(args, tile, {first, tokens}, chunk, chunk + 1, chunks_of_tile);
        const BlockJob<S> job = {layout,          panel.block(b, chunk * kChunkSteps), size,
                                 chunks[turn],    source(tile, chunk).steps,           next,
                                 chunks[turn ^ 1]};
        const auto accumulate = size > kTileTokens ? accumulate_block_for<Operands, S, 2>(parts, b)
                                                   : accumulate_block_for<Operands, S, 1>(parts, b);
        accumulate(job, sums + first * kTileRows, pending);
      }
      if constexpr (Operands::kGrouped) pending.add(pending.left());  // its scales are in the chunk
    }
    tile_barrier();
    finisher.template finish<S>(panel, sums);
  }
}

template <class Operands>
void multiply_amx_tiles(const GemmArgs& args, int64_t begin, int64_t end) {
  const AmxPanel panel(args, Operands::kStepBlocks * 4 * kBlockGroups);
  const TileConfiguration configuration(panel.tile_tokens());
  const int64_t whole = begin < end && args.layout.strips_in(end - 1) < kTileStrips ? end - 1 : end;
  multiply_tiles_of<Operands, kTileStrips>(args, panel, begin, whole);
  multiply_tiles_of<Operands, 1>(args, panel, whole, end);
}

// `activation_bytes`: of a group's four channels.
constexpr Kernel amx_kernel(int64_t activation_bytes, void (*pack_tokens)(const GemmArgs&, int64_t, int64_t),
                            void (*multiply_tiles)(const GemmArgs&, int64_t, int64_t),
                            void (*round)(Dtype, const float*, void*, int64_t)) {
  static_assert(kMaxPassTokens % kAmxBlockTokens == 0, "a pass's sums must hold whole tiles");
  return {kAmxBlockTokens, kTileTokens, kAmxBlockTokens, activation_bytes, pack_tokens, multiply_tiles,
          round,           4,           kMinPassTokens};
}

}  // namespace
