// The product itself, written once over a `Lanes` type that names the instructions. Each instruction set's file
// defines its Lanes and includes this; all of it has internal linkage, so that no code compiled for one instruction
// set can be merged by the linker into another's.
//
// A vector holds 16 rows of one token. For a group of four channels the token's four activations are broadcast, each
// row picks its two with one shuffle, and one multiply-add takes them: half the multiplications of a dense product.
// Nothing is expanded and no zero is multiplied. Rows never mix lanes and a token's groups are always added in order,
// so a token's result depends neither on its batch nor on the number of threads.
//
//   struct Lanes {
//     using Value;  using Weights, Positions, Activations, Sums;       // registers
//     static constexpr int64_t kBlockTokens;                           // accumulators that fit: tokens x 2 strips
//     static constexpr int64_t kActivationBytes;                       // four channels of one token in the panel
//     static constexpr Dtype kDtype;
//     static Weights weights(const uint8_t*);                          // one strip and group of the packed form
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
constexpr int64_t kControlBytes = 64;  // decoded positions of one strip and group
// Blocks of columns whose decoded positions and activations stay in L1 while all tokens of a pass go by.
constexpr int64_t kChunkBlocks = 8;
// How far ahead of its use the weight stream is asked for.
constexpr int64_t kPrefetchBytes = 4096;

inline uint64_t load_u64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// sums[token][strip] += the blocks' product. With kDecoded the positions come from `controls`, decoded before.
template <class Lanes, int S, int T, bool kDecoded>
void accumulate(const uint8_t* weights, const uint8_t* controls, const uint8_t* panel, int64_t blocks, float* sums) {
  constexpr int64_t value_bytes = 2 * kStripRows * item_size(Lanes::kDtype);
  constexpr int64_t block_bytes = S * kBlockGroups * (value_bytes + kPositionBytes);
  typename Lanes::Sums acc[T][S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = Lanes::load(sums + (t * kTileStrips + s) * kStripRows);

  for (int64_t block = 0; block < blocks; ++block, weights += block_bytes) {
    const uint8_t* positions = weights + S * kBlockGroups * value_bytes;
    if constexpr (!kDecoded)
      for (int64_t byte = 0; byte < block_bytes; byte += kCacheLine)
        __builtin_prefetch(weights + kPrefetchBytes + byte);
    for (int64_t g = 0; g < kBlockGroups; ++g) {
      typename Lanes::Weights w[S];
      typename Lanes::Positions p[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        w[s] = Lanes::weights(weights + (g * S + s) * value_bytes);
        p[s] = kDecoded ? Lanes::load_positions(controls + s * kControlBytes)
                        : Lanes::positions(load_u64(positions + (g * S + s) * kPositionBytes));
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const typename Lanes::Activations x = Lanes::broadcast(panel + t * Lanes::kActivationBytes);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) acc[t][s] = Lanes::multiply_add(acc[t][s], w[s], p[s], x);
      }
      panel += T * Lanes::kActivationBytes;
      if constexpr (kDecoded) controls += S * kControlBytes;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) Lanes::store(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
}

using Accumulate = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, float*);

template <class Lanes, int S, bool kDecoded, size_t... T>
Accumulate accumulate_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr Accumulate table[] = {accumulate<Lanes, S, static_cast<int>(T) + 1, kDecoded>...};
  return table[tokens - 1];
}

template <class Lanes, int S>
void decode_positions(const uint8_t* weights, int64_t blocks, uint8_t* controls) {
  constexpr int64_t value_bytes = 2 * kStripRows * item_size(Lanes::kDtype);
  constexpr int64_t block_bytes = S * kBlockGroups * (value_bytes + kPositionBytes);
  for (int64_t block = 0; block < blocks; ++block, weights += block_bytes) {
    const uint8_t* next_chunk = weights + kChunkBlocks * block_bytes;
    for (int64_t byte = 0; byte < block_bytes; byte += kCacheLine) __builtin_prefetch(next_chunk + byte, 0, 2);
    const uint8_t* positions = weights + S * kBlockGroups * value_bytes;
    for (int64_t i = 0; i < S * kBlockGroups; ++i, controls += kControlBytes)
      Lanes::store_positions(controls, Lanes::positions(load_u64(positions + i * kPositionBytes)));
  }
}

template <class Lanes, int S>
void multiply_tile(const Product& product, int64_t tile) {
  using Value = typename Lanes::Value;
  constexpr auto sizes = std::make_index_sequence<Lanes::kBlockTokens>();
  alignas(kCacheLine) float sums[kMaxPassTokens * kTileRows];
  alignas(kCacheLine) float bias[kTileRows] = {};

  const Layout& layout = product.layout;
  const int64_t first_row = tile * kTileRows;
  const int64_t rows = layout.rows - first_row < S * kStripRows ? layout.rows - first_row : S * kStripRows;
  if (product.bias) Lanes::read(static_cast<const Value*>(product.bias) + first_row, bias, rows);
  for (int64_t t = 0; t < product.tokens; ++t) std::memcpy(sums + t * kTileRows, bias, sizeof bias);

  const uint8_t* weights = product.packed + layout.tile_offset(tile);
  const TokenBlocks tokens(product.tokens, Lanes::kBlockTokens);
  if (tokens.count == 1) {
    accumulate_for<Lanes, S, false>(product.tokens, sizes)(weights, nullptr, product.panel, layout.blocks(), sums);
  } else {
    alignas(kCacheLine) uint8_t controls[kChunkBlocks * kBlockGroups * S * kControlBytes];
    for (int64_t chunk = 0; chunk < layout.blocks(); chunk += kChunkBlocks) {
      const int64_t left = layout.blocks() - chunk, blocks = left < kChunkBlocks ? left : kChunkBlocks;
      const uint8_t* chunk_weights = weights + chunk * S * layout.strip_block_bytes();
      decode_positions<Lanes, S>(chunk_weights, blocks, controls);
      for (int64_t b = 0; b < tokens.count; ++b) {
        const int64_t first = tokens.first(b), size = tokens.size(b);
        const int64_t groups_before = first * layout.groups() + chunk * kBlockGroups * size;
        accumulate_for<Lanes, S, true>(size, sizes)(chunk_weights, controls,
                                                    product.panel + groups_before * Lanes::kActivationBytes, blocks,
                                                    sums + first * kTileRows);
      }
    }
  }
  Value* y = static_cast<Value*>(product.y) + first_row;
  for (int64_t t = 0; t < product.tokens; ++t) Lanes::write(y + t * layout.rows, sums + t * kTileRows, rows);
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

// Copies the tokens of some token blocks into the panel, their channels in the stored order.
template <class Lanes>
void pack_tokens(const Product& product, int64_t begin, int64_t end) {
  using Value = typename Lanes::Value;
  const TokenBlocks blocks(product.tokens, Lanes::kBlockTokens);
  const int64_t groups = product.layout.groups(), stride = product.x_stride;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = blocks.first(b), size = blocks.size(b);
    const Value* x = static_cast<const Value*>(product.x) + first * stride;
    uint8_t* panel = product.panel + first * groups * Lanes::kActivationBytes;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t c = 4 * g;
      const int32_t* p = product.permutation + c;
      const int64_t c0 = product.permutation ? p[0] : c, c1 = product.permutation ? p[1] : c + 1;
      const int64_t c2 = product.permutation ? p[2] : c + 2, c3 = product.permutation ? p[3] : c + 3;
      for (int64_t t = 0; t < size; ++t, panel += Lanes::kActivationBytes) {
        const Value* row = x + t * stride;
        Lanes::put(panel, row[c0], row[c1], row[c2], row[c3]);
      }
    }
  }
}

template <class Lanes>
constexpr Kernel kernel_of() {
  return {Lanes::kBlockTokens, pack_tokens<Lanes>, multiply_tiles<Lanes>};
}

}  // namespace
