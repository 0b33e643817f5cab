// The product with activations that are rounded to int8, written once over a `VecTraits` type that names the
// instructions. Everything here has internal linkage, like gemm_rows.h.
//
// A vector holds 16 rows of one token. Its lanes are 32 bits: the exact sum of a row's products so far. A unit is two
// groups of four columns. The token's eight bytes of a unit are repeated through a vector, one byte shuffle gives each
// row the four that it keeps, and one instruction multiplies them by the row's four weights and adds the products:
// half the multiplications of a dense product. For 8:16 matrices a unit is 16 columns and two such vectors.
//
// The sums are exact, so they depend on no order, and become float32 at the end, times the scale of their row. int4
// weights are multiplied by the multipliers of their block, which makes int8 ones of them; for few tokens, the sums of
// a block are. What multiplies unsigned by signed bytes gets the activations plus 128; 128 times the sum of the row's
// weights, which the packed form has, is then subtracted.
//
//   struct VecTraits {
//     using Weights, Positions, Activations, Accumulators;             // registers
//     static constexpr int64_t kBlockTokens;                           // accumulators that fit: tokens x 2 strips
//     static constexpr int64_t kStreamTokens;                          // so many that come from memory are multiplied
//                                                                      // as it is unpacked
//     static constexpr int64_t kBlockSumTokens;                        // of them, for which sums of blocks pay
//     static constexpr int64_t kVectors;                               // of a unit: 1 for 2:4, 2 for 8:16
//     static constexpr int kOffset;                                    // 128 or 0: what the panel adds to activations
//     using Multipliers;                                               // registers: of a strip and block
//     static Multipliers multipliers(const uint8_t*);
//     static Weights weights8(const uint8_t*);                         // a strip and unit of the packed form
//     static Weights weights4(const uint8_t*, const Multipliers&);
//     static Weights sixteenfold(const uint8_t*);                      // 16 times the int4 ones; this and the next two
//     static Accumulators row_multipliers(const uint8_t*);             // only if kBlockSumTokens is not 0
//     static Accumulators add_block(Accumulators, Accumulators block, Accumulators multipliers);  // a 16th of block
//     static void store_weights(uint8_t*, Weights);                    // kPreparedBytes, for load_weights
//     static Weights load_weights(const uint8_t*);
//     static void positions(const uint8_t*, Positions (&)[kVectors]);  // of a strip and unit
//     static void store_positions(uint8_t*, Positions);                // kPreparedBytes, for load_positions
//     static Positions load_positions(const uint8_t*);
//     static Activations broadcast(const uint8_t*);                    // the bytes of a unit
//     static Accumulators load_sums(const int32_t*);
//     static void store_sums(int32_t*, Accumulators);
//     static Accumulators multiply_add(Accumulators, const Weights&, const Positions&, const Activations&);
//     static void halves_to_float(const uint8_t*, float*, int64_t count);  // float16, anywhere
//     static void floats_to_half(const float*, uint16_t*, int64_t count);  // from a cache line on; whole strips
//   };
#pragma once
#include <utility>

#include "epilogue.h"
#include "gemm_dense.h"
#include "prefetch_output.h"
#include "quantize_tokens.h"

namespace {

// How many bytes ahead the weights are prefetched into L2.
constexpr int64_t kInt8PrefetchBytes = 8192;

template <int kBits, int S>
struct UnitStream {  // a tile of S strips, block by block
  static constexpr int64_t value_bytes = kUnitWeights * kBits / 8;
  static constexpr int64_t positions_offset = S * kBlockUnits * value_bytes;
  static constexpr int64_t block_bytes = positions_offset + S * kBlockUnits * kUnitPositionBytes;
  static constexpr int64_t prepared_bytes = kBlockUnits * S * 2 * kPreparedBytes;

  const uint8_t* block;
  const uint8_t* multipliers;        // of this block, if it is int4
  const int64_t multipliers_stride;  // from one strip's to the next one's

  UnitStream(const Layout& layout, const uint8_t* tile)
      : block(tile + layout.block_offset(0, S)), multipliers(tile), multipliers_stride(layout.multiplier_bytes()) {}
  void skip(int64_t blocks) {
    block += blocks * block_bytes;
    multipliers += blocks * kMultiplierBytes;
  }
  const uint8_t* values(int64_t slot) const { return block + slot * value_bytes; }
  const uint8_t* positions(int64_t slot) const { return block + positions_offset + slot * kUnitPositionBytes; }
};

// The weights of a strip and block.
template <class VecTraits, int kBits>
struct StripWeights {
  StripWeights() = default;
  explicit StripWeights(const uint8_t*) {}
  typename VecTraits::Weights of(const uint8_t* values) const { return VecTraits::weights8(values); }
};
template <class VecTraits>
struct StripWeights<VecTraits, 4> {
  StripWeights() = default;
  explicit StripWeights(const uint8_t* multipliers) : multipliers(VecTraits::multipliers(multipliers)) {}
  typename VecTraits::Weights of(const uint8_t* values) const { return VecTraits::weights4(values, multipliers); }
  typename VecTraits::Multipliers multipliers;
};
template <class VecTraits>
struct StripWeights<VecTraits, 0> {  // int4 ones, whose block's sums are multiplied by the multipliers
  StripWeights() = default;
  explicit StripWeights(const uint8_t*) {}
  typename VecTraits::Weights of(const uint8_t* values) const { return VecTraits::sixteenfold(values); }
};

template <class VecTraits>
constexpr int64_t unit_channels = VecTraits::kVectors * kUnitChannels;

// acc += the product over one vector of a unit, for T tokens, whose activations follow each other in the panel.
template <class VecTraits, int S, int T>
[[gnu::always_inline]] inline void multiply_unit(typename VecTraits::Accumulators (&acc)[T][S],
                                                 const typename VecTraits::Weights (&w)[S],
                                                 const typename VecTraits::Positions (&p)[S], const uint8_t* panel) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const typename VecTraits::Activations x = VecTraits::broadcast(panel + t * unit_channels<VecTraits>);
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = VecTraits::multiply_add(acc[t][s], w[s], p[s], x);
  }
}

// sums[token][strip] += the product over some prepared units, for T tokens.
template <class VecTraits, int S, int T>
void accumulate_prepared(const uint8_t* prepared, const uint8_t* panel, int64_t units, int32_t* sums) {
  typename VecTraits::Accumulators acc[T][S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = VecTraits::load_sums(sums + (t * kTileStrips + s) * kStripRows);
  for (int64_t unit = 0; unit < units; unit += VecTraits::kVectors) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < VecTraits::kVectors; ++v) {
      typename VecTraits::Weights w[S];
      typename VecTraits::Positions p[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s, prepared += 2 * kPreparedBytes) {
        p[s] = VecTraits::load_positions(prepared);
        w[s] = VecTraits::load_weights(prepared + kPreparedBytes);
      }
      multiply_unit<VecTraits, S, T>(acc, w, p, panel);
    }
    panel += T * unit_channels<VecTraits>;
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) VecTraits::store_sums(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
}

// sums[token][strip] = the product over some blocks, for T tokens, which are all there are: the tile is read once, from
// memory, and unpacked on the way.
template <class VecTraits, int kBits, int S, int T>
void accumulate_stream(UnitStream<kBits, S> stream, const uint8_t* panel, int64_t blocks, int32_t* sums) {
  constexpr int64_t block_bytes = UnitStream<kBits, S>::block_bytes;
  constexpr int V = VecTraits::kVectors;
  const typename VecTraits::Accumulators zero = VecTraits::load_sums(kZeros);
  constexpr bool kSumsBlocks = kBits == 4 && T <= VecTraits::kBlockSumTokens;
  using Strip = StripWeights<VecTraits, kSumsBlocks ? 0 : kBits>;
  typename VecTraits::Accumulators acc[T][S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = zero;
  for (int64_t block = 0; block < blocks; ++block, stream.skip(1)) {
#pragma GCC unroll 10
    for (int64_t byte = 0; byte < block_bytes; byte += kCacheLine)
      __builtin_prefetch(stream.block + kInt8PrefetchBytes + byte, 0, 2);
    Strip weights[S];
    typename VecTraits::Accumulators before[T][S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) weights[s] = Strip(stream.multipliers + s * stream.multipliers_stride);
    if constexpr (kSumsBlocks)
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) before[t][s] = acc[t][s], acc[t][s] = zero;
    for (int64_t slot = 0; slot < kBlockUnits * S; slot += V * S) {
      typename VecTraits::Positions positions[S][V];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) VecTraits::positions(stream.positions(slot + V * s), positions[s]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        typename VecTraits::Weights w[S];
        typename VecTraits::Positions p[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
          w[s] = weights[s].of(stream.values(slot + v * S + s));
          p[s] = positions[s][v];
        }
        multiply_unit<VecTraits, S, T>(acc, w, p, panel);
      }
      panel += T * unit_channels<VecTraits>;
    }
    if constexpr (kSumsBlocks)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        const auto multipliers = VecTraits::row_multipliers(stream.multipliers + s * stream.multipliers_stride);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t][s] = VecTraits::add_block(before[t][s], acc[t][s], multipliers);
      }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) VecTraits::store_sums(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
}

using AccumulatePrepared = void (*)(const uint8_t*, const uint8_t*, int64_t, int32_t*);
template <int kBits, int S>
using AccumulateStream = void (*)(UnitStream<kBits, S>, const uint8_t*, int64_t, int32_t*);

template <class VecTraits, int S, size_t... T>
AccumulatePrepared accumulate_prepared_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr AccumulatePrepared table[] = {accumulate_prepared<VecTraits, S, static_cast<int>(T) + 1>...};
  return table[tokens - 1];
}

template <class VecTraits, int kBits, int S, size_t... T>
AccumulateStream<kBits, S> accumulate_stream_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr AccumulateStream<kBits, S> table[] = {
      accumulate_stream<VecTraits, kBits, S, static_cast<int>(T) + 1>...};
  return table[tokens - 1];
}

// Prepares a chunk of `blocks` blocks for many tokens.
template <class VecTraits, int kBits, int S>
void prepare(UnitStream<kBits, S> stream, int64_t blocks, uint8_t* to) {
  constexpr int V = VecTraits::kVectors;
  for (int64_t block = 0; block < blocks; ++block, stream.skip(1), to += stream.prepared_bytes)
    for (int s = 0; s < S; ++s) {
      const StripWeights<VecTraits, kBits> weights(stream.multipliers + s * stream.multipliers_stride);
      for (int64_t slot = 0; slot < kBlockUnits * S; slot += V * S) {
        typename VecTraits::Positions positions[V];
        VecTraits::positions(stream.positions(slot + V * s), positions);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          uint8_t* unit = to + (slot + v * S + s) * 2 * kPreparedBytes;
          VecTraits::store_positions(unit, positions[v]);
          VecTraits::store_weights(unit + kPreparedBytes, weights.of(stream.values(slot + v * S + s)));
        }
      }
    }
}

// Tokens whose results finish_tile has at a time.
constexpr int64_t kFinishedTokens = 8;

// What becomes of a tile's sums: (sum * scale of the row) * scale of the token + bias, then as finish_sums says.
// `kOffset`: what was added to the activations.
template <class VecTraits, int kOffset>
void finish_tile(const GemmArgs& args, int64_t tile, const float* token_scales, const int32_t* sums) {
  const TileRows rows(args.layout, tile);
  const int64_t item = bits(args.act_dtype) / 8;
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, results[kFinishedTokens * kTileRows];
  alignas(kCacheLine) int32_t offsets[kTileRows] = {};
  if (args.bias)
    load_floats<VecTraits>(args.act_dtype, static_cast<const uint8_t*>(args.bias) + rows.first * item, bias,
                           rows.count);
  std::memcpy(scales, args.packed + args.layout.row_scales_offset() + rows.first * sizeof(float),
              rows.count * sizeof(float));
  if constexpr (kOffset != 0) {
    std::memcpy(offsets, args.packed + args.layout.row_sums_offset() + rows.first * sizeof(int32_t),
                rows.count * sizeof(int32_t));
    for (int32_t& offset : offsets) offset *= kOffset;
  }
  for (int64_t first_token = 0; first_token < args.tokens; first_token += kFinishedTokens) {
    const int64_t left = args.tokens - first_token, tokens = left < kFinishedTokens ? left : kFinishedTokens;
    for (int64_t t = 0; t < tokens; ++t, sums += kTileRows)
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float sum = static_cast<float>(sums[r] - offsets[r]) * scales[r];
        results[t * kTileRows + r] = sum * token_scales[first_token + t] + bias[r];
      }
    finish_sums(args, rows, results, first_token, tokens,
                [&](const float* from, int64_t tokens, int64_t first, int64_t stride, int64_t count) {
                  uint8_t* y = static_cast<uint8_t*>(args.y) + first * item;
                  for (int64_t t = 0; t < tokens; ++t)
                    store_floats<VecTraits>(args.act_dtype, from + t * kTileRows, y + t * stride * item, count);
                });
  }
}

// A pass of many tokens: each chunk of the tile is prepared, then multiplies one block of tokens after another.
template <class VecTraits, int kBits, int S>
void multiply_chunks(const GemmArgs& args, int64_t tile, UnitStream<kBits, S> stream, int32_t* sums) {
  const int64_t all = args.layout.blocks();
  const TokenBlocks tokens(args.tokens, VecTraits::kBlockTokens);
  alignas(kCacheLine) uint8_t prepared[kInt8ChunkBlocks * stream.prepared_bytes];
  for (int64_t first = 0; first < all; first += kInt8ChunkBlocks) {
    const int64_t left = all - first, blocks = left < kInt8ChunkBlocks ? left : kInt8ChunkBlocks;
    prepare<VecTraits, kBits, S>(stream, blocks, prepared);
    stream.skip(blocks);
    // The next chunk is prefetched little by little: at once, it would hold up the loads of the first token block.
    const int64_t bytes = blocks * stream.block_bytes, share = (bytes / tokens.count / kCacheLine + 1) * kCacheLine;
    const uint8_t *next = stream.block, *const next_end = next + bytes;
    for (int64_t b = 0; b < tokens.count; ++b) {
      const auto accumulate =
          accumulate_prepared_for<VecTraits, S>(tokens.size(b), std::make_index_sequence<VecTraits::kBlockTokens>());
      const uint8_t* panel = args.panel + int8_panel_offset(args.tokens, first, blocks, tokens.first(b));
      for (const uint8_t* stop = next_end - next < share ? next_end : next + share; next < stop; next += kCacheLine)
        __builtin_prefetch(next, 0, 2);
      prefetch_output(args, tile, {tokens.first(b), tokens.size(b)}, first, first + blocks, all);
      accumulate(prepared, panel, blocks * kBlockUnits, sums + tokens.first(b) * kTileRows);
    }
  }
}

template <class VecTraits, int kBits, int S>
void multiply_tile(const GemmArgs& args, int64_t tile) {
  alignas(kCacheLine) int32_t sums[kMaxPassTokens * kTileRows];
  std::memset(sums, 0, args.tokens * kTileRows * sizeof *sums);
  const UnitStream<kBits, S> stream(args.layout, args.packed + args.layout.tile_offset(tile));
  if (args.tokens <= VecTraits::kStreamTokens)  // the tile comes from memory
    accumulate_stream_for<VecTraits, kBits, S>(args.tokens, std::make_index_sequence<VecTraits::kStreamTokens>())(
        stream, args.panel, args.layout.blocks(), sums);
  else
    multiply_chunks<VecTraits, kBits, S>(args, tile, stream, sums);
  finish_tile<VecTraits, VecTraits::kOffset>(args, tile, token_scales_of(args), sums);
}

template <class VecTraits, int kBits>
void multiply_int8_tiles(const GemmArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (args.layout.strips_in(tile) == kTileStrips)
      multiply_tile<VecTraits, kBits, kTileStrips>(args, tile);
    else
      multiply_tile<VecTraits, kBits, 1>(args, tile);
  }
}

template <class VecTraits, int kBits>
constexpr Kernels int8_kernel() {
  constexpr int64_t tokens = VecTraits::kBlockTokens;
  static_assert(VecTraits::kStreamTokens <= tokens, "a pass from memory is one token block");
  return {{tokens, 1, tokens, kUnitChannels / 2, quantize_tokens<VecTraits, tokens>,
           multiply_int8_tiles<VecTraits, kBits>, store_all_floats<VecTraits>, sizeof(float)}};
}

template <class VecTraits>
constexpr Int8Products int8_products() {
  return {int8_kernel<VecTraits, 8>(), int8_kernel<VecTraits, 4>()};
}

template <class VecTraits>
constexpr Int8Kernels int8_kernels(const Int8Products& of_16) {
  return {int8_products<VecTraits>(), &of_16, quantize_token<VecTraits, 0>, multiply_dense<VecTraits>};
}

}  // namespace
