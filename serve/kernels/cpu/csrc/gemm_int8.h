// The product with activations that are rounded to int8, written once over a `VecTraits` type that names the
// instructions. Everything here has internal linkage, like gemm_rows.h.
//
// A vector holds 16 rows of one token. Its lanes are 32 bits: the exact sum of a row's products so far. A unit is two
// groups of four columns. The token's eight bytes of a unit are repeated through a vector, one byte shuffle gives each
// row the four that it keeps, and one instruction multiplies them by the row's four weights and adds the products:
// half the multiplications of a dense product. For 8:16 matrices a unit is 16 columns and two such vectors.
//
// The sums are exact, so they depend on no order. They become float32 where the scale changes: after each section of
// columns that shares its scales, or at the end. int4 weights are multiplied by 16, which saves moving their bits, and
// the sums are divided by 16 again. What multiplies unsigned by signed bytes gets the activations plus 128; 128 times
// the weights is then subtracted from the sums.
//
//   struct VecTraits {
//     using Weights, Positions, Activations, Accumulators;             // registers
//     static constexpr int64_t kBlockTokens;                           // accumulators that fit: tokens x 2 strips
//     static constexpr int64_t kStreamTokens;                          // with those of the weights' sums beside them
//     static constexpr int64_t kVectors;                               // of a unit: 1 for 2:4, 2 for 8:16
//     static constexpr int kOffset;                                    // 128 or 0: what the panel adds to activations
//     static Weights weights8(const uint8_t*), weights4(const uint8_t*);  // a strip and unit of the packed form
//     static void store_weights(uint8_t*, Weights);                    // kPreparedBytes, for load_weights
//     static Weights load_weights(const uint8_t*);
//     static void positions(const uint8_t*, Positions (&)[kVectors]);  // of a strip and unit
//     static void store_positions(uint8_t*, Positions);                // kPreparedBytes, for load_positions
//     static Positions load_positions(const uint8_t*);
//     static Activations broadcast(const uint8_t*);                    // the bytes of a unit
//     static Accumulators load_sums(const int32_t*);
//     static void store_sums(int32_t*, Accumulators);
//     static Accumulators multiply_add(Accumulators, const Weights&, const Positions&, const Activations&);
//     static Accumulators add_weights(Accumulators, const Weights&);   // kOffset times each of a row's; if it is not 0
//     static Accumulators subtract(Accumulators, Accumulators);
//     static void add_scaled(float* sums, Accumulators, const float* scales);
//     static void halves_to_float(const uint8_t*, float*, int64_t count);  // float16, anywhere
//     static void floats_to_half(const float*, uint16_t*, int64_t count);  // from a cache line on; whole strips
//   };
#pragma once
#include <type_traits>
#include <utility>

#include "epilogue.h"
#include "gemm_dense.h"
#include "prefetch_output.h"
#include "quantize_tokens.h"

namespace {

// How many bytes ahead the weights are prefetched into L2.
constexpr int64_t kInt8PrefetchBytes = 4096;

template <int kBits, int S>
struct UnitStream {  // a tile of S strips, block by block
  static constexpr int64_t value_bytes = kUnitWeights * kBits / 8;
  static constexpr int64_t positions_offset = S * kBlockUnits * value_bytes;
  static constexpr int64_t block_bytes = positions_offset + S * kBlockUnits * kUnitPositionBytes;
  static constexpr int64_t prepared_bytes = kBlockUnits * S * 2 * kPreparedBytes;
  static constexpr int shift = kBits == 4 ? 4 : 0;

  static const uint8_t* values(const uint8_t* block, int64_t slot) { return block + slot * value_bytes; }
  static const uint8_t* positions(const uint8_t* block, int64_t slot) {
    return block + positions_offset + slot * kUnitPositionBytes;
  }
};

template <class VecTraits, int kBits>
typename VecTraits::Weights weights_of(const uint8_t* values) {
  if constexpr (kBits == 8)
    return VecTraits::weights8(values);
  else
    return VecTraits::weights4(values);
}

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

// The sums of a tile and pass: integers, or with sections float32.
template <bool kSections>
using Sum = std::conditional_t<kSections, float, int32_t>;

// sums[token][strip] += the product over some prepared units, for T tokens. The units of a section start with its
// `weight_sums`, and its scales multiply the product.
template <class VecTraits, int S, int T, bool kSections>
void accumulate_prepared(const uint8_t* prepared, const uint8_t* panel, int64_t units, const int32_t* weight_sums,
                         const float* scales, Sum<kSections>* sums) {
  typename VecTraits::Accumulators acc[T][S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      if constexpr (kSections)
        acc[t][s] = VecTraits::load_sums(weight_sums + s * kStripRows);
      else
        acc[t][s] = VecTraits::load_sums(sums + (t * kTileStrips + s) * kStripRows);
    }
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
    for (int s = 0; s < S; ++s) {
      if constexpr (kSections)
        VecTraits::add_scaled(sums + (t * kTileStrips + s) * kStripRows, acc[t][s], scales + s * kStripRows);
      else
        VecTraits::store_sums(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
    }
}

// sums[token][strip] = the product over some blocks, for T tokens, which are all there are: the tile is read once, from
// memory, and unpacked on the way.
template <class VecTraits, int kBits, int S, int T>
void accumulate_stream(const uint8_t* stream, const uint8_t* panel, int64_t blocks, int32_t* sums) {
  using Stream = UnitStream<kBits, S>;
  constexpr int V = VecTraits::kVectors;
  const typename VecTraits::Accumulators zero = VecTraits::load_sums(kZeros);
  typename VecTraits::Accumulators acc[T][S], weight_sums[S];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = zero;
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s) weight_sums[s] = zero;
  for (int64_t block = 0; block < blocks; ++block, stream += Stream::block_bytes) {
#pragma GCC unroll 10
    for (int64_t byte = 0; byte < Stream::block_bytes; byte += kCacheLine)
      __builtin_prefetch(stream + kInt8PrefetchBytes + byte, 0, 2);
    for (int64_t slot = 0; slot < kBlockUnits * S; slot += V * S) {
      typename VecTraits::Positions positions[S][V];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) VecTraits::positions(Stream::positions(stream, slot + V * s), positions[s]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        typename VecTraits::Weights w[S];
        typename VecTraits::Positions p[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
          w[s] = weights_of<VecTraits, kBits>(Stream::values(stream, slot + v * S + s));
          p[s] = positions[s][v];
          if constexpr (VecTraits::kOffset != 0) weight_sums[s] = VecTraits::add_weights(weight_sums[s], w[s]);
        }
        multiply_unit<VecTraits, S, T>(acc, w, p, panel);
      }
      panel += T * unit_channels<VecTraits>;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s)
      VecTraits::store_sums(sums + (t * kTileStrips + s) * kStripRows, VecTraits::subtract(acc[t][s], weight_sums[s]));
}

template <bool kSections>
using AccumulatePrepared = void (*)(const uint8_t*, const uint8_t*, int64_t, const int32_t*, const float*,
                                    Sum<kSections>*);
using AccumulateStream = void (*)(const uint8_t*, const uint8_t*, int64_t, int32_t*);

template <class VecTraits, int S, bool kSections, size_t... T>
AccumulatePrepared<kSections> accumulate_prepared_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr AccumulatePrepared<kSections> table[] = {
      accumulate_prepared<VecTraits, S, static_cast<int>(T) + 1, kSections>...};
  return table[tokens - 1];
}

template <class VecTraits, int kBits, int S, size_t... T>
AccumulateStream accumulate_stream_for(int64_t tokens, std::index_sequence<T...>) {
  static constexpr AccumulateStream table[] = {accumulate_stream<VecTraits, kBits, S, static_cast<int>(T) + 1>...};
  return table[tokens - 1];
}

// sums += a section's integers times its scales, for `tokens` tokens of S strips.
template <class VecTraits, int S>
void add_section(const int32_t* integers, int64_t tokens, const float* scales, float* sums) {
  for (int64_t t = 0; t < tokens; ++t, integers += kTileRows, sums += kTileRows)
    for (int64_t r = 0; r < S * kStripRows; r += kStripRows)
      VecTraits::add_scaled(sums + r, VecTraits::load_sums(integers + r), scales + r);
}

// The scales of a section of a tile. int4 weights are 16 times too large.
template <class VecTraits, int kBits>
void load_scales(const Layout& layout, const uint8_t* from, int64_t count, float* to) {
  load_floats<VecTraits>(layout.scale_dtype, from, to, count);
  if constexpr (kBits == 4)
    for (int64_t i = 0; i < count; ++i) to[i] *= 1.0f / 16;
}

// A chunk of a tile, prepared for many tokens.
template <int S>
struct PreparedChunk {
  alignas(kCacheLine) uint8_t units[kInt8ChunkBlocks * UnitStream<8, S>::prepared_bytes];
  alignas(kCacheLine) int32_t weight_sums[kInt8ChunkBlocks][S * kStripRows];  // of each section, times -kOffset
  alignas(kCacheLine) float scales[kInt8ChunkBlocks][S * kStripRows];
};

// Prepares `blocks` blocks from `stream` on, in sections of `section_blocks`. Returns the end.
template <class VecTraits, int kBits, int S, bool kSections>
const uint8_t* prepare(const Layout& layout, const uint8_t* stream, int64_t blocks, int64_t section_blocks,
                       PreparedChunk<S>& chunk) {
  using Stream = UnitStream<kBits, S>;
  constexpr int V = VecTraits::kVectors;
  typename VecTraits::Accumulators zero = VecTraits::load_sums(kZeros);
  int64_t unit = 0;
  for (int64_t section = 0; section * section_blocks < blocks; ++section) {
    typename VecTraits::Accumulators sums[S];
    for (int s = 0; s < S; ++s) sums[s] = zero;
    for (int64_t block = 0; block < section_blocks; ++block, stream += Stream::block_bytes, unit += kBlockUnits * S)
      for (int64_t slot = 0; slot < kBlockUnits * S; slot += V * S)
        for (int s = 0; s < S; ++s) {
          typename VecTraits::Positions positions[V];
          VecTraits::positions(Stream::positions(stream, slot + V * s), positions);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            const auto weights = weights_of<VecTraits, kBits>(Stream::values(stream, slot + v * S + s));
            uint8_t* to = chunk.units + (unit + slot + v * S + s) * 2 * kPreparedBytes;
            VecTraits::store_positions(to, positions[v]);
            VecTraits::store_weights(to + kPreparedBytes, weights);
            if constexpr (VecTraits::kOffset != 0) sums[s] = VecTraits::add_weights(sums[s], weights);
          }
        }
    for (int s = 0; s < S; ++s)
      VecTraits::store_sums(chunk.weight_sums[section] + s * kStripRows, VecTraits::subtract(zero, sums[s]));
    if constexpr (kSections) {
      load_scales<VecTraits, kBits>(layout, stream, S * kStripRows, chunk.scales[section]);
      stream += S * layout.strip_scale_bytes();
    }
  }
  return stream;
}

// Tokens whose results finish_tile has at a time.
constexpr int64_t kFinishedTokens = 8;

// What becomes of a tile's sums: (sum * scale of the row) * scale of the token + bias, then as finish_sums says.
template <class VecTraits, int kBits, bool kSections>
void finish_tile(const GemmArgs& args, int64_t tile, const float* token_scales, const int32_t* weight_sums,
                 const Sum<kSections>* sums) {
  const TileRows rows(args.layout, tile);
  const int64_t item = bits(args.act_dtype) / 8;
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, results[kFinishedTokens * kTileRows];
  if (args.bias)
    load_floats<VecTraits>(args.act_dtype, static_cast<const uint8_t*>(args.bias) + rows.first * item, bias,
                           rows.count);
  if constexpr (!kSections)
    std::memcpy(scales, args.packed + args.layout.row_scales_offset() + rows.first * sizeof(float),
                rows.count * sizeof(float));
  for (int64_t first_token = 0; first_token < args.tokens; first_token += kFinishedTokens) {
    const int64_t left = args.tokens - first_token, tokens = left < kFinishedTokens ? left : kFinishedTokens;
    for (int64_t t = 0; t < tokens; ++t, sums += kTileRows)
      for (int64_t r = 0; r < kTileRows; ++r) {
        float sum;
        if constexpr (kSections)
          sum = sums[r];
        else
          sum = static_cast<float>((sums[r] + weight_sums[r]) >> UnitStream<kBits, 1>::shift) * scales[r];
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

// A pass of few tokens: the tile comes from memory, section by section.
template <class VecTraits, int kBits, int S, bool kSections>
void multiply_stream(const GemmArgs& args, const uint8_t* stream, Sum<kSections>* sums) {
  const Layout& layout = args.layout;
  const auto accumulate =
      accumulate_stream_for<VecTraits, kBits, S>(args.tokens, std::make_index_sequence<VecTraits::kStreamTokens>());
  if constexpr (!kSections) {
    accumulate(stream, args.panel, layout.blocks(), sums);
  } else {
    alignas(kCacheLine) int32_t integers[VecTraits::kStreamTokens * kTileRows];
    alignas(kCacheLine) float scales[S * kStripRows];
    const int64_t blocks = layout.section_blocks(), panel_bytes = blocks * kBlockUnits * kUnitChannels * args.tokens;
    const uint8_t* panel = args.panel;
    for (int64_t left = layout.blocks(); left > 0; left -= blocks, panel += panel_bytes) {
      accumulate(stream, panel, blocks, integers);
      stream += blocks * UnitStream<kBits, S>::block_bytes;
      for (int64_t byte = 0; byte < S * layout.strip_scale_bytes(); byte += kCacheLine)
        __builtin_prefetch(stream + kInt8PrefetchBytes + byte, 0, 2);
      load_scales<VecTraits, kBits>(layout, stream, S * kStripRows, scales);
      stream += S * layout.strip_scale_bytes();
      add_section<VecTraits, S>(integers, args.tokens, scales, sums);
    }
  }
}

// A pass of many tokens: each chunk of the tile is prepared, then multiplies one block of tokens after another.
template <class VecTraits, int kBits, int S, bool kSections>
void multiply_chunks(const GemmArgs& args, int64_t tile, const uint8_t* stream, int32_t* weight_sums,
                     Sum<kSections>* sums) {
  const Layout& layout = args.layout;
  const TokenBlocks tokens(args.tokens, VecTraits::kBlockTokens);
  alignas(kCacheLine) PreparedChunk<S> chunk;
  for (int64_t first = 0; first < layout.blocks(); first += kInt8ChunkBlocks) {
    const int64_t left = layout.blocks() - first, blocks = left < kInt8ChunkBlocks ? left : kInt8ChunkBlocks;
    const int64_t section_blocks = kSections ? layout.section_blocks() : blocks;
    const uint8_t* end = prepare<VecTraits, kBits, S, kSections>(layout, stream, blocks, section_blocks, chunk);
    // The next chunk is prefetched little by little: at once, it would hold up the loads of the first token block.
    const int64_t bytes = end - stream, share = (bytes / tokens.count / kCacheLine + 1) * kCacheLine;
    const uint8_t *next = end, *const next_end = end + bytes;
    stream = end;
    if constexpr (!kSections)
      for (int64_t r = 0; r < S * kStripRows; ++r) weight_sums[r] += chunk.weight_sums[0][r];
    const int64_t units = section_blocks * kBlockUnits;
    for (int64_t b = 0; b < tokens.count; ++b) {
      const auto accumulate = accumulate_prepared_for<VecTraits, S, kSections>(
          tokens.size(b), std::make_index_sequence<VecTraits::kBlockTokens>());
      const uint8_t* panel = args.panel + int8_panel_offset(args.tokens, first, blocks, tokens.first(b));
      for (const uint8_t* stop = next_end - next < share ? next_end : next + share; next < stop; next += kCacheLine)
        __builtin_prefetch(next, 0, 2);
      prefetch_output(args, tile, {tokens.first(b), tokens.size(b)}, first, first + blocks, layout.blocks());
      for (int64_t section = 0; section * section_blocks < blocks; ++section)
        accumulate(chunk.units + section * units * S * 2 * kPreparedBytes,
                   panel + section * units * kUnitChannels * tokens.size(b), units, chunk.weight_sums[section],
                   chunk.scales[section], sums + tokens.first(b) * kTileRows);
    }
  }
}

template <class VecTraits, int kBits, int S, bool kSections>
void multiply_tile(const GemmArgs& args, int64_t tile) {
  alignas(kCacheLine) Sum<kSections> sums[kMaxPassTokens * kTileRows];
  alignas(kCacheLine) int32_t weight_sums[kTileRows] = {};
  std::memset(sums, 0, args.tokens * kTileRows * sizeof *sums);
  const uint8_t* stream = args.packed + args.layout.tile_offset(tile);
  if (args.tokens <= VecTraits::kStreamTokens)
    multiply_stream<VecTraits, kBits, S, kSections>(args, stream, sums);
  else
    multiply_chunks<VecTraits, kBits, S, kSections>(args, tile, stream, weight_sums, sums);
  finish_tile<VecTraits, kBits, kSections>(args, tile, token_scales_of(args), weight_sums, sums);
}

template <class VecTraits, int kBits, bool kSections>
void multiply_int8_tiles(const GemmArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (args.layout.strips_in(tile) == kTileStrips)
      multiply_tile<VecTraits, kBits, kTileStrips, kSections>(args, tile);
    else
      multiply_tile<VecTraits, kBits, 1, kSections>(args, tile);
  }
}

template <class VecTraits, int kBits, bool kSections>
constexpr Kernels int8_kernel() {
  constexpr int64_t tokens = VecTraits::kBlockTokens;
  static_assert(VecTraits::kStreamTokens <= tokens, "a pass from memory is one token block");
  return {{tokens, 1, tokens, kUnitChannels / 2, quantize_tokens<VecTraits, tokens>,
           multiply_int8_tiles<VecTraits, kBits, kSections>, store_all_floats<VecTraits>, sizeof(float)}};
}

template <class VecTraits, int kBits>
constexpr Int8Products::ByScales int8_kernels_by_scales() {
  return {int8_kernel<VecTraits, kBits, false>(), int8_kernel<VecTraits, kBits, true>(),
          int8_kernel<VecTraits, kBits, true>()};
}

template <class VecTraits>
constexpr Int8Products int8_products() {
  return {int8_kernels_by_scales<VecTraits, 8>(), int8_kernels_by_scales<VecTraits, 4>()};
}

template <class VecTraits>
constexpr Int8Kernels int8_kernels(const Int8Products& of_16) {
  return {int8_products<VecTraits>(), &of_16, quantize_token<VecTraits, 0>, multiply_dense<VecTraits>};
}

}  // namespace
