// The product for many tokens on fp32 lanes. A vector holds one row of 8 or 16 tokens. A chunk of channels (a block of
// the packed form) lies in L1 with the tokens of a channel side by side, so the two channels that a row keeps of a
// group are two loads, whose addresses come from the positions: a group costs two multiply-adds with a memory operand
// where dense needs four, and no shuffle. It reads the same packed form as the product over rows and adds in the same
// order, so a token's sum has the same bits from both.
//
//   struct Lanes {  // besides what product.h needs
//     // 16 rows' weights as fp32; their activations' offsets, of which `offsets` has one for each position
//     static void spread_weights(const Weights&, float* first, float* second);
//     static void spread_positions(const Positions&, const uint32_t (&offsets)[4], uint32_t* first, uint32_t* second);
//     using TokenLanes;
//   };
//   struct TokenLanes {
//     using Vector;                                                    // fp32 of kTokens tokens
//     static constexpr int64_t kTokens;
//     static constexpr int kSums;                                      // vectors of sums that the registers hold
//     static Vector load(const float*);  static void store(float*, Vector);
//     static Vector broadcast(const float*);
//     static Vector multiply_add(Vector weight, Vector x, Vector sum);
//     static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride);  // kTokens x kTokens
//   };
#pragma once
#include "product.h"

namespace {

// Not std::min, which the linker could take from another instruction set's file.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Most vectors of a token block. A block of columns of so many tokens fits L1, beside the weights of a tile.
constexpr int kBlockVectors = 12;
// Tiles that go through the columns together, so that a chunk of the panel comes to L1 once for all of them.
constexpr int64_t kTilesTogether = 4;

// A group of a tile's rows, as the loop over tokens wants it.
struct SpreadGroup {
  float first[kTileRows], second[kTileRows];
  uint32_t first_offset[kTileRows], second_offset[kTileRows];  // of their activations, in bytes, from the chunk's first
};

// Rows that V vectors of tokens leave accumulators for.
template <class TokenLanes, int V>
constexpr int rows_beside() {
  int rows = 1;
  while (rows < 8 && 2 * rows * V <= TokenLanes::kSums) rows *= 2;
  return rows;
}

// sums[row][token] += the product over a chunk's groups, for V vectors of tokens.
template <class TokenLanes, int V>
void add_chunk(const SpreadGroup* spread, int64_t rows, const uint8_t* panel, float* sums) {
  constexpr int R = rows_beside<TokenLanes, V>();
  constexpr int64_t width = TokenLanes::kTokens;
  using Vector = typename TokenLanes::Vector;
  for (int64_t row = 0; row < rows; row += R, sums += R * V * width) {
    Vector acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) acc[r][v] = TokenLanes::load(sums + (r * V + v) * width);
    for (int64_t g = 0; g < kBlockGroups; ++g) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector first = TokenLanes::broadcast(spread[g].first + row + r);
        const Vector second = TokenLanes::broadcast(spread[g].second + row + r);
        const float* x_first = reinterpret_cast<const float*>(panel + spread[g].first_offset[row + r]);
        const float* x_second = reinterpret_cast<const float*>(panel + spread[g].second_offset[row + r]);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v)
          acc[r][v] = TokenLanes::multiply_add(first, TokenLanes::load(x_first + v * width), acc[r][v]);
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v)
          acc[r][v] = TokenLanes::multiply_add(second, TokenLanes::load(x_second + v * width), acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) TokenLanes::store(sums + (r * V + v) * width, acc[r][v]);
  }
}

using AddChunk = void (*)(const SpreadGroup*, int64_t, const uint8_t*, float*);

template <class TokenLanes, size_t... V>
AddChunk add_chunk_for(int64_t vectors, std::index_sequence<V...>) {
  static constexpr AddChunk table[] = {add_chunk<TokenLanes, static_cast<int>(V) + 1>...};
  return table[vectors - 1];
}

// A pass in the panel: chunk after chunk, in it token block after token block, each [channel][token]. All token blocks
// have the room of the largest, so that one set of offsets serves them all.
template <class Lanes>
struct TokenPanel {
  TokenBlocks tokens;
  static constexpr int64_t width = Lanes::TokenLanes::kTokens;
  explicit TokenPanel(int64_t count) : tokens(count, kBlockVectors * width, width) {}
  int64_t channel_bytes() const { return tokens.most() * sizeof(float); }
  int64_t offset(int64_t chunk, int64_t block) const {
    return (chunk * tokens.count + block) * kBlockGroups * 4 * channel_bytes();
  }
};

// Spreads a chunk of a tile, which starts at `weights`.
template <class Lanes>
void spread_chunk(const uint8_t* weights, int64_t strips, const uint32_t (&offsets)[kBlockGroups][4],
                  SpreadGroup* spread) {
  const int64_t value_bytes = 2 * kStripRows * item_size(Lanes::kDtype);
  const uint8_t* positions = weights + kBlockGroups * strips * value_bytes;
  for (int64_t g = 0; g < kBlockGroups; ++g) {
    for (int64_t row = 0; row < strips * kStripRows; row += kStripRows) {
      Lanes::spread_weights(Lanes::weights(weights), spread[g].first + row, spread[g].second + row);
      Lanes::spread_positions(Lanes::positions(load_u64(positions)), offsets[g], spread[g].first_offset + row,
                              spread[g].second_offset + row);
      weights += value_bytes;
      positions += kPositionBytes;
    }
  }
}

// Some tiles, chunk after chunk of columns, all tokens of the pass through each.
template <class Lanes>
void multiply_tiles_together(const Product& product, int64_t first_tile, int64_t tiles) {
  constexpr int64_t width = Lanes::TokenLanes::kTokens;
  constexpr auto sizes = std::make_index_sequence<kBlockVectors>();
  alignas(kCacheLine) float all_sums[kTilesTogether][kMaxPassTokens * kTileRows];
  alignas(kCacheLine) SpreadGroup spread[kBlockGroups];
  uint32_t offsets[kBlockGroups][4];  // of a chunk's channels in the panel
  const Layout& layout = product.layout;
  const TokenPanel<Lanes> panel(product.tokens);
  const TokenBlocks& tokens = panel.tokens;
  const auto sums_of = [&](int64_t tile, int64_t block) {
    return all_sums[tile - first_tile] + block * tokens.most() * kTileRows;
  };

  for (uint32_t c = 0; c < kBlockGroups * 4; ++c)
    offsets[c / 4][c % 4] = c * static_cast<uint32_t>(panel.channel_bytes());
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const TileEnds<Lanes> ends(product, tile);
    for (int64_t b = 0; b < tokens.count; ++b)
      for (int64_t r = 0; r < ends.padded_rows; ++r)
        for (int64_t t = 0; t < tokens.padded(b); ++t) sums_of(tile, b)[r * tokens.padded(b) + t] = ends.start[r];
  }
  for (int64_t chunk = 0; chunk < layout.blocks(); ++chunk)
    for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
      const int64_t strips = layout.strips_in(tile), bytes = strips * layout.strip_block_bytes();
      const uint8_t* weights = product.packed + layout.tile_offset(tile) + chunk * bytes;
      for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(weights + bytes + byte, 0, 2);
      spread_chunk<Lanes>(weights, strips, offsets, spread);
      for (int64_t b = 0; b < tokens.count; ++b)
        add_chunk_for<typename Lanes::TokenLanes>(tokens.padded(b) / width, sizes)(
            spread, strips * kStripRows, product.panel + panel.offset(chunk, b), sums_of(tile, b));
    }
  for (int64_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    const TileEnds<Lanes> ends(product, tile);
    for (int64_t b = 0; b < tokens.count; ++b)
      for (int64_t t = 0; t < tokens.size(b); t += width) {
        alignas(kCacheLine) float by_token[width * kTileRows];
        for (int64_t r = 0; r < ends.padded_rows; r += width)
          Lanes::TokenLanes::transpose(sums_of(tile, b) + r * tokens.padded(b) + t, tokens.padded(b), by_token + r,
                                       kTileRows);
        ends.finish(by_token, tokens.first(b) + t, least(tokens.size(b) - t, width));
      }
  }
}

template <class Lanes>
void multiply_tiles_by_tokens(const Product& product, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile += kTilesTogether)
    multiply_tiles_together<Lanes>(product, tile, least(end - tile, kTilesTogether));
}

// Copies the tokens of some token blocks into the panel, their channels in the stored order. A vector that the tokens
// do not fill ends with zeros. One vector of tokens at a time: with a power of two of channels a channel's values of
// all tokens fall into the same set of the cache, which holds eight lines.
template <class Lanes>
void pack_vectors(const Product& product, int64_t begin, int64_t end) {
  using Value = typename Lanes::Value;
  constexpr int64_t width = Lanes::TokenLanes::kTokens;
  const TokenPanel<Lanes> panel(product.tokens);
  const int64_t stride = product.x_stride, room = panel.tokens.most();
  const int32_t* permutation = product.permutation;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = 0; first < panel.tokens.size(b); first += width) {
      const auto* x = static_cast<const Value*>(product.x) + (panel.tokens.first(b) + first) * stride;
      const int64_t tokens = least(panel.tokens.size(b) - first, width);
      for (int64_t chunk = 0, c = 0; chunk < product.layout.blocks(); ++chunk) {
        float* to = reinterpret_cast<float*>(product.panel + panel.offset(chunk, b)) + first;
        for (const int64_t last = c + 4 * kBlockGroups; c < last; ++c, to += room) {
          const Value* from = x + (permutation ? permutation[c] : c);
          if (tokens == width)
            for (int64_t t = 0; t < width; ++t) to[t] = from[t * stride].to_float();
          else
            for (int64_t t = 0; t < width; ++t) to[t] = t < tokens ? from[t * stride].to_float() : 0.0f;
        }
      }
    }
}

template <class Lanes>
constexpr Kernel token_kernel_of() {
  constexpr int64_t width = Lanes::TokenLanes::kTokens;
  static_assert(kMaxPassTokens % (kBlockVectors * width) == 0, "a pass's sums have room for whole token blocks");
  return {kBlockVectors * width, width, width, 4 * sizeof(float), pack_vectors<Lanes>, multiply_tiles_by_tokens<Lanes>};
}

}  // namespace
