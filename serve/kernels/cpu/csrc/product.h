// The product itself, written once over a `Lanes` type that names the instructions. Each instruction set's file
// defines its Lanes and includes this; all of it has internal linkage, so that no code compiled for one instruction
// set can be merged by the linker into another's.
//
// A vector holds 16 rows of one token. For a group of four channels the token's four activations are broadcast, each
// row picks its two with one shuffle, and one multiply-add takes them: half the multiplications of a dense product.
// Nothing is expanded and no zero is multiplied. Rows never mix lanes and a token's groups are always added in order,
// so a token's result depends neither on its batch nor on the number of threads. Many tokens on fp32 lanes go
// another way, with the same additions: token_product.h.
//
//   struct Lanes {
//     using Value;  using Weights, Positions, Activations, Sums;       // registers
//     static constexpr int64_t kBlockTokens;                           // accumulators that fit: tokens x 2 strips
//     static constexpr int64_t kActivationBytes;                       // four channels of one token in the panel
//     static constexpr Dtype kDtype;
//     static constexpr bool kExpands;                                  // weights() does more than load: see `expand`
//     static Weights weights(const uint8_t*);                          // one strip and group of the packed form
//     static void expand(uint8_t*, Weights);                           // for load_expanded; both only if kExpands
//     static Weights load_expanded(const uint8_t*);
//     static Positions positions(uint64_t);
//     static Positions load_positions(const uint8_t*);  static void store_positions(uint8_t*, Positions);
//     static Activations broadcast(const uint8_t*);
//     static Sums load(const float*);  static void store(float*, Sums);
//     static Sums multiply_add(Sums, const Weights&, const Positions&, const Activations&);
//     static void put(uint8_t* panel, Value, Value, Value, Value);     // four channels of one token
//     static void read(const Value*, float*, int64_t count);   static void write(Value*, const float*, int64_t count);
//   };
#pragma once
#include <cstring>
#include <utility>

#include "kernels.h"

namespace {

using namespace ria;

constexpr int64_t kCacheLine = 64;
constexpr int64_t kDecodedBytes = 64;   // positions of one strip and group, as the shuffle wants them
constexpr int64_t kExpandedBytes = 64;  // weights of one strip and group, where they are expanded beforehand
// Blocks of columns whose decoded positions, weights and activations stay in L1 while all tokens of a pass go by.
constexpr int64_t kChunkBlocks = 4;

// How many blocks ahead of its use the weight stream is brought into L2. One token consumes the stream as fast as it
// arrives; the more tokens, the longer each block takes and the further ahead memory can work.
// int8 blocks are nearly half as long, and take longer for their length.
constexpr int64_t prefetch_blocks(int tokens, bool expands) { return tokens == 1 && !expands ? 2 : 8; }

inline uint64_t load_u64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Where a token block's activations for a chunk of columns start. Within a chunk one token block follows another, each
// [group][token][4 channels], so that a tile reads the panel from one end to the other.
template <class Lanes>
int64_t panel_offset(const Product& product, int64_t chunk, int64_t chunk_blocks, int64_t first_token) {
  return (chunk * product.tokens + first_token * chunk_blocks) * kBlockGroups * Lanes::kActivationBytes;
}

template <class Lanes, int S>
struct Stream {  // a tile of S strips, block by block
  static constexpr int64_t value_bytes = 2 * kStripRows * item_size(Lanes::kDtype);
  static constexpr int64_t positions_offset = S * kBlockGroups * value_bytes;
  static constexpr int64_t block_bytes = positions_offset + S * kBlockGroups * kPositionBytes;
  static constexpr int64_t decoded_bytes = S * kBlockGroups * kDecodedBytes;
  // What is made of a block that is used more than once: decoded positions, then expanded weights.
  static constexpr int64_t prepared_bytes = decoded_bytes + (Lanes::kExpands ? S * kBlockGroups * kExpandedBytes : 0);

  static void decode(const uint8_t* block, uint8_t* decoded) {
    for (int64_t i = 0; i < S * kBlockGroups; ++i)
      Lanes::store_positions(decoded + i * kDecodedBytes,
                             Lanes::positions(load_u64(block + positions_offset + i * kPositionBytes)));
  }
  static void prepare(const uint8_t* block, uint8_t* prepared) {
    decode(block, prepared);
    if constexpr (Lanes::kExpands)
      for (int64_t i = 0; i < S * kBlockGroups; ++i)
        Lanes::expand(prepared + decoded_bytes + i * kExpandedBytes, Lanes::weights(block + i * value_bytes));
  }
};

// sums[token][strip] += the product over `blocks` blocks, for T tokens. A tile that is used once, for one block of
// tokens, comes from memory and its positions are decoded here (kFromMemory); else `prepared` has them.
template <class Lanes, int S, int T, bool kFromMemory>
void accumulate(const uint8_t* weights, const uint8_t* prepared, const uint8_t* panel, int64_t blocks, float* sums) {
  using Tile = Stream<Lanes, S>;
  typename Lanes::Sums acc[T][S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = Lanes::load(sums + (t * kTileStrips + s) * kStripRows);

  alignas(kCacheLine) uint8_t decoded_block[kFromMemory ? Tile::decoded_bytes : 1];
  for (int64_t block = 0; block < blocks; ++block, weights += Tile::block_bytes) {
    const uint8_t* decoded = prepared;
    const uint8_t* ahead = weights + prefetch_blocks(T, Lanes::kExpands) * Tile::block_bytes;
    if constexpr (kFromMemory) {
      Tile::decode(weights, decoded_block);
      decoded = decoded_block;
    }
    for (int64_t g = 0; g < kBlockGroups; ++g) {
      if constexpr (kFromMemory) {
        constexpr int64_t group_bytes = Tile::block_bytes / kBlockGroups;
#pragma GCC unroll 5
        for (int64_t byte = 0; byte < group_bytes; byte += kCacheLine)
          __builtin_prefetch(ahead + g * group_bytes + byte, 0, 2);
      }
      typename Lanes::Weights w[S];
      typename Lanes::Positions p[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s, decoded += kDecodedBytes) {
        if constexpr (Lanes::kExpands && !kFromMemory)
          w[s] = Lanes::load_expanded(prepared + Tile::decoded_bytes + (g * S + s) * kExpandedBytes);
        else
          w[s] = Lanes::weights(weights + (g * S + s) * Tile::value_bytes);
        p[s] = Lanes::load_positions(decoded);
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t, panel += Lanes::kActivationBytes) {
        const typename Lanes::Activations x = Lanes::broadcast(panel);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) acc[t][s] = Lanes::multiply_add(acc[t][s], w[s], p[s], x);
      }
    }
    if constexpr (!kFromMemory) prepared += Tile::prepared_bytes;
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) Lanes::store(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
}

using Accumulate = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, float*);

template <class Lanes, int S, bool kFromMemory, size_t... T>
Accumulate accumulate_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr Accumulate table[] = {accumulate<Lanes, S, static_cast<int>(T) + 1, kFromMemory>...};
  return table[tokens - 1];
}

// A pass of more tokens than fit the registers: chunk after chunk of columns, all tokens through each.
template <class Lanes, int S>
void accumulate_chunks(const Product& product, const TokenBlocks& tokens, const uint8_t* weights, float* sums) {
  using Tile = Stream<Lanes, S>;
  constexpr auto sizes = std::make_index_sequence<Lanes::kBlockTokens>();
  alignas(kCacheLine) uint8_t prepared[kChunkBlocks * Tile::prepared_bytes];
  const int64_t all_blocks = product.layout.blocks();
  for (int64_t chunk = 0; chunk < all_blocks; chunk += kChunkBlocks, weights += kChunkBlocks * Tile::block_bytes) {
    const int64_t blocks = all_blocks - chunk < kChunkBlocks ? all_blocks - chunk : kChunkBlocks;
    const uint8_t* next = weights + kChunkBlocks * Tile::block_bytes;
    for (int64_t byte = 0; byte < kChunkBlocks * Tile::block_bytes; byte += kCacheLine)
      __builtin_prefetch(next + byte, 0, 2);
    for (int64_t block = 0; block < blocks; ++block)
      Tile::prepare(weights + block * Tile::block_bytes, prepared + block * Tile::prepared_bytes);
    for (int64_t b = 0; b < tokens.count; ++b) {
      const uint8_t* panel = product.panel + panel_offset<Lanes>(product, chunk, blocks, tokens.first(b));
      accumulate_for<Lanes, S, false>(tokens.size(b), sizes)(weights, prepared, panel, blocks,
                                                             sums + tokens.first(b) * kTileRows);
    }
  }
}

// Where the sums of a tile's rows start and what becomes of them.
template <class Lanes>
struct TileEnds {
  using Value = typename Lanes::Value;
  static constexpr bool kScaled = scaled(Lanes::kDtype);
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, start[kTileRows] = {};
  Value* y;  // first token, the tile's first row
  int64_t y_stride, rows, padded_rows;

  TileEnds(const Product& product, int64_t tile) {
    const Layout& layout = product.layout;
    const int64_t first_row = tile * kTileRows;
    y = static_cast<Value*>(product.y) + first_row;
    y_stride = layout.rows;
    padded_rows = layout.strips_in(tile) * kStripRows;
    rows = layout.rows - first_row < padded_rows ? layout.rows - first_row : padded_rows;
    if (product.bias) Lanes::read(static_cast<const Value*>(product.bias) + first_row, bias, rows);
    if constexpr (kScaled)
      std::memcpy(scales, product.packed + layout.scales_offset() + first_row * sizeof(float), rows * sizeof(float));
    else
      std::memcpy(start, bias, sizeof start);
  }
  // Writes the results of `tokens` tokens; sums: [tokens][kTileRows], which it uses up.
  void finish(float* sums, int64_t first_token, int64_t tokens) const {
    if constexpr (kScaled)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < padded_rows; ++r)
          sums[t * kTileRows + r] = sums[t * kTileRows + r] * scales[r] + bias[r];
    for (int64_t t = 0; t < tokens; ++t) Lanes::write(y + (first_token + t) * y_stride, sums + t * kTileRows, rows);
  }
};

template <class Lanes, int S>
void multiply_tile(const Product& product, int64_t tile) {
  alignas(kCacheLine) float sums[kMaxPassTokens * kTileRows];
  const TileEnds<Lanes> ends(product, tile);
  for (int64_t t = 0; t < product.tokens; ++t) std::memcpy(sums + t * kTileRows, ends.start, sizeof ends.start);

  const uint8_t* weights = product.packed + product.layout.tile_offset(tile);
  const TokenBlocks tokens(product.tokens, Lanes::kBlockTokens);
  if (tokens.count == 1)
    accumulate_for<Lanes, S, true>(product.tokens, std::make_index_sequence<Lanes::kBlockTokens>())(
        weights, nullptr, product.panel, product.layout.blocks(), sums);
  else
    accumulate_chunks<Lanes, S>(product, tokens, weights, sums);
  ends.finish(sums, 0, product.tokens);
}

template <class Lanes>
void multiply_tiles(const Product& product, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (product.layout.strips_in(tile) == kTileStrips)
      multiply_tile<Lanes, kTileStrips>(product, tile);
    else
      multiply_tile<Lanes, 1>(product, tile);
  }
}

// Four channels of `tokens` tokens into the panel. Plain locals: the panel's bytes may alias anything else.
template <class Lanes, class Value = typename Lanes::Value>
void put_group(const Value* x, int64_t stride, const int64_t (&c)[4], int64_t tokens, uint8_t* panel) {
  const Value *x0 = x + c[0], *x1 = x + c[1], *x2 = x + c[2], *x3 = x + c[3];
  for (int64_t t = 0, i = 0; t < tokens; ++t, i += stride, panel += Lanes::kActivationBytes)
    Lanes::put(panel, x0[i], x1[i], x2[i], x3[i]);
}

// Copies the tokens of some token blocks into the panel, their channels in the stored order.
template <class Lanes>
void pack_tokens(const Product& product, int64_t begin, int64_t end) {
  const TokenBlocks tokens(product.tokens, Lanes::kBlockTokens);
  const int64_t all_blocks = product.layout.blocks(), stride = product.x_stride;
  const int32_t* permutation = product.permutation;
  for (int64_t b = begin; b < end; ++b) {
    const auto* x = static_cast<const typename Lanes::Value*>(product.x) + tokens.first(b) * stride;
    const int64_t size = tokens.size(b);
    for (int64_t chunk = 0; chunk < all_blocks; chunk += kChunkBlocks) {
      const int64_t blocks = all_blocks - chunk < kChunkBlocks ? all_blocks - chunk : kChunkBlocks;
      const int64_t first = chunk * 4 * kBlockGroups, last = first + blocks * 4 * kBlockGroups;
      uint8_t* panel = product.panel + panel_offset<Lanes>(product, chunk, blocks, tokens.first(b));
      for (int64_t c = first; c < last; c += 4, panel += size * Lanes::kActivationBytes) {
        if (permutation)
          put_group<Lanes>(x, stride, {permutation[c], permutation[c + 1], permutation[c + 2], permutation[c + 3]},
                           size, panel);
        else
          put_group<Lanes>(x, stride, {c, c + 1, c + 2, c + 3}, size, panel);
      }
    }
  }
}

template <class Lanes>
constexpr Kernel kernel_of() {
  return {Lanes::kBlockTokens,  1, Lanes::kBlockTokens, Lanes::kActivationBytes, pack_tokens<Lanes>,
          multiply_tiles<Lanes>};
}

}  // namespace
