// The product with vectors over tokens, for many tokens and fp32 arithmetic. A vector holds one row of 8 or 16 tokens.
// A chunk of channels (a block of the packed form) lies in L1 with the tokens of a channel side by side, so the two
// channels that a row keeps of a group are two loads, at addresses that come from the positions: a group costs two
// multiply-adds with a memory operand, where dense needs four, and no shuffle. It reads the same packed form as
// gemm_rows.h and adds in the same order, so both give a token the same bits.
//
//   struct VecTraits {  // besides what gemm_rows.h needs
//     // For 16 rows: their weights as fp32, and the offsets of their activations; `offsets` has one for each position
//     // in a unit.
//     static void unpack_weights(const Weights&, float* first, float* second);
//     static void unpack_offsets(const Positions&, const uint32_t* offsets, uint32_t* first, uint32_t* second);
//     static constexpr int64_t kMinTokens;  // from so many on, vectors over tokens are faster than vectors over rows
//     using TokenVecTraits;
//   };
//   struct TokenVecTraits {
//     using Vector;                                                    // fp32 of kTokens tokens
//     static constexpr int64_t kTokens;
//     static constexpr int kAccumulators;                              // vectors of sums that the registers hold
//     static Vector load(const float*);
//     static void store(float*, Vector);
//     static Vector broadcast(const float*);
//     static Vector multiply_add(Vector weight, Vector x, Vector sum);
//     static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride);  // kTokens x kTokens
//   };
#pragma once
#include "gemm_rows.h"

namespace {

// Not std::min: the linker could take it from another instruction set's file.
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// The most vectors in a token block. A block of columns of this many tokens fits L1 beside a tile's weights.
constexpr int kBlockVectors = 12;
// Tiles that are multiplied together, so that a chunk of the panel is brought into L1 once for all of them.
constexpr int64_t kTileBatch = 4;

// One group of a tile's rows, unpacked for the loop over tokens.
struct UnpackedGroup {
  float first[kTileRows], second[kTileRows];
  // Of their activations, in bytes from the start of the chunk.
  uint32_t first_offset[kTileRows], second_offset[kTileRows];
};

// What the loop over tokens needs for a row and a group. It is loaded one row ahead, the first row of a group during
// the last one of the group before: the addresses of the activations come from memory, and a processor's queue is full
// of multiply-adds that wait for them.
template <class TokenVecTraits>
struct RowOfGroup {
  typename TokenVecTraits::Vector first, second;
  const float *x_first, *x_second;
  RowOfGroup(const UnpackedGroup& group, int64_t row, const uint8_t* panel)
      : first(TokenVecTraits::broadcast(group.first + row)),
        second(TokenVecTraits::broadcast(group.second + row)),
        x_first(reinterpret_cast<const float*>(panel + group.first_offset[row])),
        x_second(reinterpret_cast<const float*>(panel + group.second_offset[row])) {}
};

// Rows for which the registers hold accumulators beside V vectors of tokens.
template <class TokenVecTraits, int V>
constexpr int rows_beside() {
  int rows = 1;
  while (rows < 8 && 2 * rows * V <= TokenVecTraits::kAccumulators) rows *= 2;
  return rows;
}

// Where a chunk lies among those that share their scales.
struct Section {
  bool first;
  float* partial;       // like the sums, of the chunks before this one
  const float* scales;  // of the tile's rows; null unless this chunk is the last one
};

// sums[row][token] += the product over a chunk's groups, for V vectors of tokens. section: null without scales of
// groups.
template <class TokenVecTraits, int V>
void accumulate_unpacked(const UnpackedGroup* unpacked, int64_t rows, const uint8_t* panel, float* sums,
                         const Section* section) {
  constexpr int R = rows_beside<TokenVecTraits, V>();
  constexpr int64_t width = TokenVecTraits::kTokens;
  using Vector = typename TokenVecTraits::Vector;
  float* partial = section ? section->partial : sums;
  for (int64_t row = 0; row < rows; row += R, sums += R * V * width, partial += R * V * width) {
    Vector acc[R][V];
    const bool from_zero = section && section->first;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v)
        acc[r][v] = from_zero ? Vector{} : TokenVecTraits::load(partial + (r * V + v) * width);
    RowOfGroup<TokenVecTraits> next(unpacked[0], row, panel);
    for (int64_t g = 0; g < kBlockGroups; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const RowOfGroup<TokenVecTraits> now = next;
        next = r + 1 < R ? RowOfGroup<TokenVecTraits>(unpacked[g], row + r + 1, panel)
                         : RowOfGroup<TokenVecTraits>(unpacked[g + 1], row, panel);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v)
          acc[r][v] = TokenVecTraits::multiply_add(now.first, TokenVecTraits::load(now.x_first + v * width), acc[r][v]);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v)
          acc[r][v] =
              TokenVecTraits::multiply_add(now.second, TokenVecTraits::load(now.x_second + v * width), acc[r][v]);
      }
    }
    const bool scales = section && section->scales;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) {
        const int64_t at = (r * V + v) * width;
        if (scales)
          TokenVecTraits::store(
              sums + at, TokenVecTraits::multiply_add(TokenVecTraits::broadcast(section->scales + row + r), acc[r][v],
                                                      TokenVecTraits::load(sums + at)));
        else
          TokenVecTraits::store(partial + at, acc[r][v]);
      }
  }
}

using AccumulateUnpacked = void (*)(const UnpackedGroup*, int64_t, const uint8_t*, float*, const Section*);

template <class TokenVecTraits, size_t... V>
AccumulateUnpacked accumulate_unpacked_for(int64_t vectors, std::index_sequence<V...>) {
  static constexpr AccumulateUnpacked table[] = {accumulate_unpacked<TokenVecTraits, static_cast<int>(V) + 1>...};
  return table[vectors - 1];
}

// How a pass lies in the panel: [chunk][token block][channel][token]. Each token block takes the space of the largest,
// so that one set of offsets serves them all.
template <class VecTraits>
struct TokenPanel {
  TokenBlocks tokens;
  static constexpr int64_t width = VecTraits::TokenVecTraits::kTokens;
  explicit TokenPanel(int64_t count) : tokens(count, kBlockVectors * width, width) {}
  int64_t channel_bytes() const { return tokens.max_size() * sizeof(float); }
  int64_t offset(int64_t chunk, int64_t block) const {
    return (chunk * tokens.count + block) * kBlockGroups * 4 * channel_bytes();
  }
};

// Unpacks the chunk of a tile that starts at `weights`.
template <class VecTraits>
void unpack_chunk(const uint8_t* weights, int64_t strips, const uint32_t* offsets, UnpackedGroup* unpacked) {
  Unpacked<VecTraits> of_strips[kTileStrips];
  for_each_group(
      [&](auto g) __attribute__((always_inline)) {
        for (int64_t strip = 0; strip < strips; ++strip) {
          const int64_t row = strip * kStripRows;
          const auto& positions = of_strips[strip].template unpack<g>(weights, strips, strip);
          VecTraits::unpack_weights(of_strips[strip].weights, unpacked[g].first + row, unpacked[g].second + row);
          VecTraits::unpack_offsets(positions, offsets + 4 * (g - g % VecTraits::kVectors),
                                    unpacked[g].first_offset + row, unpacked[g].second_offset + row);
        }
      },
      kGroupsOfBlock);
}

// Multiplies some tiles: for each chunk of columns, all of them and all tokens of the pass.
template <class VecTraits>
void multiply_tile_batch(const GemmArgs& args, int64_t first_tile, int64_t tiles) {
  constexpr int64_t width = VecTraits::TokenVecTraits::kTokens;
  constexpr auto sizes = std::make_index_sequence<kBlockVectors>();
  alignas(kCacheLine) float all_sums[kTileBatch][kMaxPassTokens * kTileRows];
  alignas(kCacheLine) float all_partial[VecTraits::kGrouped ? kTileBatch : 1][kMaxPassTokens * kTileRows];
  alignas(kCacheLine) float scales[kTileRows];
  alignas(kCacheLine) UnpackedGroup unpacked[kBlockGroups + 1];  // the last one is only loaded
  alignas(kCacheLine) uint32_t offsets[kBlockGroups * 4];        // of a chunk's channels in the panel
  const Layout& layout = args.layout;
  const TokenPanel<VecTraits> panel(args.tokens);
  const TokenBlocks& tokens = panel.tokens;
  const auto sums_of = [&](int64_t tile, int64_t block) {
    return all_sums[tile - first_tile] + block * tokens.max_size() * kTileRows;
  };
  const auto section_of = [&](int64_t chunk, int64_t tile, int64_t block) -> Section {
    return {chunk % layout.section_blocks() == 0,
            all_partial[tile - first_tile] + block * tokens.max_size() * kTileRows,
            (chunk + 1) % layout.section_blocks() == 0 ? scales : nullptr};
  };

  unpacked[kBlockGroups] = {};
  for (uint32_t c = 0; c < kBlockGroups * 4; ++c) offsets[c] = c * static_cast<uint32_t>(panel.channel_bytes());
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const Epilogue<VecTraits> epilogue(args, tile);
    for (int64_t b = 0; b < tokens.count; ++b)
      for (int64_t r = 0; r < epilogue.rows.padded; ++r)
        for (int64_t t = 0; t < tokens.padded_size(b); ++t)
          sums_of(tile, b)[r * tokens.padded_size(b) + t] = epilogue.initial[r];
  }
  for (int64_t chunk = 0; chunk < layout.blocks(); ++chunk)
    for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
      const int64_t strips = layout.strips_in(tile), bytes = strips * layout.strip_block_bytes();
      const uint8_t* weights = args.packed + layout.tile_offset(tile) + layout.block_offset(chunk, strips);
      for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(weights + bytes + byte, 0, 2);
      unpack_chunk<VecTraits>(weights, strips, offsets, unpacked);
      if constexpr (VecTraits::kGrouped)
        if ((chunk + 1) % layout.section_blocks() == 0)
          for (int64_t s = 0; s < strips; ++s)
            VecTraits::store(
                scales + s * kStripRows,
                VecTraits::load_scales(weights + bytes + s * layout.strip_scale_bytes(), layout.scale_dtype));
      for (int64_t b = 0; b < tokens.count; ++b) {
        prefetch_output(args, tile, {tokens.first(b), tokens.size(b)}, chunk, chunk + 1, layout.blocks());
        const Section section = VecTraits::kGrouped ? section_of(chunk, tile, b) : Section{};
        accumulate_unpacked_for<typename VecTraits::TokenVecTraits>(tokens.padded_size(b) / width, sizes)(
            unpacked, strips * kStripRows, args.panel + panel.offset(chunk, b), sums_of(tile, b),
            VecTraits::kGrouped ? &section : nullptr);
      }
    }
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const Epilogue<VecTraits> epilogue(args, tile);
    for (int64_t b = 0; b < tokens.count; ++b)
      for (int64_t t = 0; t < tokens.size(b); t += width) {
        alignas(kCacheLine) float by_token[width * kTileRows];
        for (int64_t r = 0; r < epilogue.rows.padded; r += width)
          VecTraits::TokenVecTraits::transpose(sums_of(tile, b) + r * tokens.padded_size(b) + t, tokens.padded_size(b),
                                               by_token + r, kTileRows);
        epilogue.apply(by_token, tokens.first(b) + t, min_of(tokens.size(b) - t, width));
      }
  }
}

template <class VecTraits>
void multiply_tiles_by_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile += kTileBatch)
    multiply_tile_batch<VecTraits>(args, tile, min_of(end - tile, kTileBatch));
}

// Copies the tokens of some token blocks to the panel, with their channels in the order of the weight's columns. A
// vector that is only partly filled ends with zeros. It goes one vector of tokens at a time: if the number of channels
// is a power of two, all tokens' values of a channel fall into the same set of the cache, which holds eight lines.
template <class VecTraits, class Value>
void pack_vectors_of(const GemmArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t width = VecTraits::TokenVecTraits::kTokens;
  const TokenPanel<VecTraits> panel(args.tokens);
  const int64_t stride = args.x_stride, capacity = panel.tokens.max_size();
  const int32_t* permutation = args.permutation;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = 0; first < panel.tokens.size(b); first += width) {
      const int64_t first_token = panel.tokens.first(b) + first, tokens = min_of(panel.tokens.size(b) - first, width);
      const auto* x = static_cast<const Value*>(args.x);
      int64_t at[width];  // where each token is in x
      for (int64_t t = 0; t < tokens; ++t)
        at[t] = (args.x_rows ? args.x_rows[first_token + t] : first_token + t) * stride;
      for (int64_t chunk = 0, c = 0; chunk < args.layout.blocks(); ++chunk) {
        float* to = reinterpret_cast<float*>(args.panel + panel.offset(chunk, b)) + first;
        for (const int64_t last = c + 4 * kBlockGroups; c < last; ++c, to += capacity) {
          const Value* from = x + (permutation ? permutation[c] : c);
          if (tokens == width)
            for (int64_t t = 0; t < width; ++t) to[t] = from[at[t]].to_float();
          else
            for (int64_t t = 0; t < width; ++t) to[t] = t < tokens ? from[at[t]].to_float() : 0.0f;
        }
      }
    }
}

template <class VecTraits>
void pack_vectors(const GemmArgs& args, int64_t begin, int64_t end) {
  with_activation<VecTraits>(args.act_dtype,
                             [&](auto value) { pack_vectors_of<VecTraits, decltype(value)>(args, begin, end); });
}

template <class VecTraits>
constexpr Kernel token_kernel() {
  constexpr int64_t width = VecTraits::TokenVecTraits::kTokens;
  static_assert(kMaxPassTokens % (kBlockVectors * width) == 0, "a pass's sums must hold whole token blocks");
  return {kBlockVectors * width,
          width,
          width,
          4 * sizeof(float),
          pack_vectors<VecTraits>,
          multiply_tiles_by_tokens<VecTraits>,
          round_values<VecTraits>};
}

struct RowAndTokenKernels {
  template <class VecTraits>
  static constexpr Kernels of() {
    return {row_kernel<VecTraits>(), VecTraits::kMinTokens, token_kernel<VecTraits>()};
  }
};

}  // namespace
