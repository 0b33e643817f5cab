// The product with vectors over rows, written once over a `VecTraits` type that names the instructions. Each
// instruction set's file defines its traits and includes this header. Everything here has internal linkage, so that the
// linker cannot merge code compiled for one instruction set into another's.
//
// A vector holds 16 rows of one token. For each group of four channels the token's four activations are broadcast, each
// row picks its two with one shuffle, and one multiply-add takes them: half the multiplications of a dense product.
// For 8:16 matrices, four groups are a unit: all four pick from its 16 activations.
// Nothing is decompressed and no zero is multiplied. Rows never mix lanes, and a token's groups are always added in the
// same order, so a token's result depends neither on its batch nor on the number of threads. With fp32 vectors, many
// tokens take another path with the same additions: gemm_tokens.h.
//
//   struct VecTraits {
//     using Value;                                                     // activations, bias and y, unless
//     static constexpr bool kAnyActivations;                           // args.act_dtype says what they are
//     using Weights, Positions, Activations, Accumulators;             // registers
//     static constexpr int64_t kBlockTokens;                           // accumulators that fit: tokens x 2 strips
//     static constexpr int64_t kActivationBytes;                       // of four channels of one token, in the panel
//     static constexpr int64_t kVectors;                               // groups of a unit: 1 for 2:4, 4 for 8:16
//     static constexpr Dtype kDtype;
//     static constexpr int64_t kTokensWithSums;                        // if kGrouped: fit twice, sums and accumulators
//     static constexpr int kUnpackedTokens;  // int4 read from memory: for up to so many it is unpacked into registers
//     static constexpr bool kGrouped;                                  // scales belong to groups of columns
//     static constexpr bool kExpands;                                  // weights() does more than load: see `expand`
//     static Weights weights(const uint8_t*);                          // one strip and group of the packed form
//     static void expand(uint8_t*, Weights);                           // for load_expanded; both only if kExpands
//     static Weights load_expanded(const uint8_t*);
//     static void positions(const uint8_t*, Positions (&)[kVectors]);  // of one strip and unit, unless int4_positions
//     template <int kGroup> static Weights int4_weights(const uint8_t* block);  // of one strip, if kDtype is int4
//     template <int kGroup> static Positions int4_positions(const uint8_t* block);           // and for 2:4
//     static Positions load_positions(const uint8_t*);
//     static void store_positions(uint8_t*, Positions);
//     static Activations broadcast(const uint8_t*);                    // those of a unit
//     static Accumulators load(const float*);
//     static void store(float*, Accumulators);
//     static Accumulators multiply_add(Accumulators, const Weights&, const Positions&, const Activations&);
//     static constexpr bool kSumsBlocks;                               // each block of columns is summed up by itself
//     static Accumulators add_block(Accumulators);                     // its sum to those before, if kSumsBlocks
//     static Accumulators load_scales(const uint8_t*, Dtype);          // of 16 rows; this and `scaled` if kGrouped
//     static Accumulators scaled(const Accumulators& sums, const Accumulators& scales, const Accumulators& initial);
//     // Four channels of one token: those of a unit's group.
//     static void store_channels(uint8_t* unit, int64_t group, Value, Value, Value, Value);
//     static void store_from_float(Value*, const float*, int64_t count);       // both for any, if kAnyActivations
//   };
#pragma once
#include <cstring>
#include <utility>

#include "epilogue.h"
#include "prefetch_output.h"

namespace {

using namespace ria;

constexpr int64_t kDecodedBytes = 64;  // positions of one strip and group, as the shuffle takes them
// Of the weights of one strip and group, if they are expanded beforehand.
template <class VecTraits>
constexpr int64_t kExpandedBytes = sizeof(typename VecTraits::Weights);
// Blocks of columns in a chunk. Its decoded positions, weights and activations stay in L1 for all tokens of a pass.
// Columns that share a scale are never in two chunks.
constexpr int64_t kChunkBlocks = 4;

// How many blocks ahead the weights are prefetched into L2. One token consumes the stream as fast as it arrives; with
// more tokens each block takes longer, and memory can work further ahead. int8 blocks are nearly half as long, and take
// longer for their length. int4 blocks are a third as long.
template <class VecTraits>
constexpr int64_t prefetch_blocks(int tokens) {
  return VecTraits::kDtype == Dtype::int4 ? 16 : tokens == 1 && !VecTraits::kExpands ? 2 : 8;
}

inline uint64_t load_u64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Byte offset, in the panel, of a token block's activations for a chunk of columns. Within a chunk one token block
// follows another, each [group][token][4 channels], so that a tile reads the panel from one end to the other.
template <class VecTraits>
int64_t panel_offset(const GemmArgs& args, int64_t chunk, int64_t chunk_blocks, int64_t first_token) {
  return (chunk * args.tokens + first_token * chunk_blocks) * kBlockGroups * VecTraits::kActivationBytes;
}

// Of a token and unit, in the panel.
template <class VecTraits>
constexpr int64_t kUnitBytes = VecTraits::kVectors * VecTraits::kActivationBytes;

// The weights of one strip and group of a block.
template <class VecTraits, int kGroup>
[[gnu::always_inline]] inline typename VecTraits::Weights weights_of_group(const uint8_t* block, int64_t strips,
                                                                           int64_t strip) {
  constexpr Layout layout{1, 64, VecTraits::kDtype};
  if constexpr (VecTraits::kDtype == Dtype::int4)
    return VecTraits::template int4_weights<kGroup>(block + strip * layout.strip_block_bytes());
  else
    return VecTraits::weights(block + (kGroup * strips + strip) * layout.value_bytes());
}

// With their positions. A unit's groups have to be unpacked in turn: the first one decodes the positions of all.
template <class VecTraits>
struct Unpacked {
  typename VecTraits::Weights weights;
  typename VecTraits::Positions of_unit[VecTraits::kVectors];

  template <int kGroup>
  [[gnu::always_inline]] const typename VecTraits::Positions& unpack(const uint8_t* block, int64_t strips,
                                                                     int64_t strip) {
    constexpr int64_t V = VecTraits::kVectors;
    constexpr Layout layout{1, 64, VecTraits::kDtype};
    weights = weights_of_group<VecTraits, kGroup>(block, strips, strip);
    if constexpr (VecTraits::kDtype == Dtype::int4 && V == 1)
      of_unit[0] = VecTraits::template int4_positions<kGroup>(block + strip * layout.strip_block_bytes());
    else if constexpr (V == 1)
      VecTraits::positions(
          block + kBlockGroups * strips * layout.value_bytes() + (kGroup * strips + strip) * kPositionBytes, of_unit);
    else if constexpr (kGroup % V == 0)
      VecTraits::positions(block + layout.masks_offset(kGroup, strips, strip), of_unit);
    return of_unit[kGroup % V];
  }
};

// body(group) for each group of a block, whose number is a constant.
template <class Body, size_t... kGroups>
[[gnu::always_inline]] inline void for_each_group(const Body& body, std::index_sequence<kGroups...>) {
  (body(std::integral_constant<int, kGroups>()), ...);
}
constexpr auto kGroupsOfBlock = std::make_index_sequence<kBlockGroups>();

template <class VecTraits, int S>
struct TileStream {  // a tile of S strips, block by block
  static constexpr int64_t value_bytes = kStripRows * pair_bytes(VecTraits::kDtype);
  static constexpr int64_t positions_offset = S * kBlockGroups * value_bytes;
  static constexpr int64_t block_bytes = positions_offset + S * kBlockGroups * kPositionBytes;
  static constexpr int64_t decoded_bytes = S * kBlockGroups * kDecodedBytes;
  // A block that is used more than once is prepared: decoded positions, then expanded weights.
  static constexpr int64_t prepared_bytes =
      decoded_bytes + (VecTraits::kExpands ? S * kBlockGroups * kExpandedBytes<VecTraits> : 0);

  static void decode(const uint8_t* block, uint8_t* decoded) {
    constexpr int64_t V = VecTraits::kVectors;
    const uint8_t* from = block + positions_offset;
    for (int64_t unit = 0; unit < kBlockGroups; unit += V)
#pragma GCC unroll 2
      for (int64_t s = 0; s < S; ++s, from += V * kPositionBytes) {
        typename VecTraits::Positions positions[V];
        VecTraits::positions(from, positions);
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v)
          VecTraits::store_positions(decoded + ((unit + v) * S + s) * kDecodedBytes, positions[v]);
      }
  }
  [[gnu::noinline]] static void prepare(const uint8_t* block, uint8_t* prepared) {
    if constexpr (VecTraits::kExpands) {
      Unpacked<VecTraits> unpacked[S];
      for_each_group(
          [&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int64_t s = 0; s < S; ++s) {
              const int64_t slot = group * S + s;
              VecTraits::store_positions(prepared + slot * kDecodedBytes,
                                         unpacked[s].template unpack<group>(block, S, s));
              VecTraits::expand(prepared + decoded_bytes + slot * kExpandedBytes<VecTraits>, unpacked[s].weights);
            }
          },
          kGroupsOfBlock);
    } else {
      decode(block, prepared);
    }
  }
};

template <class VecTraits, int S, int T>
constexpr int64_t bytes_ahead() {
  return prefetch_blocks<VecTraits>(T) * TileStream<VecTraits, S>::block_bytes;
}

// The next blocks of a tile, in turn, as the loops over them advance.
struct Stream {
  const uint8_t* weights;
  const uint8_t* prepared;  // null: the tile is read once, from memory, and prepared on the way
  const uint8_t* panel;
};

// acc[token][strip] += the product over `blocks` blocks, for T tokens.
template <class VecTraits, int S, int T, bool kFromMemory>
[[gnu::always_inline]] inline void accumulate_blocks(Stream& stream, int64_t blocks,
                                                     typename VecTraits::Accumulators (&acc)[T][S]) {
  using Tile = TileStream<VecTraits, S>;
  constexpr bool kInt4 = VecTraits::kDtype == Dtype::int4;
  constexpr bool kUnpacks = kInt4 && kFromMemory && T <= VecTraits::kUnpackedTokens;
  constexpr bool kPrepared = !kFromMemory || (kInt4 && !kUnpacks);
  auto [weights, prepared, panel] = stream;
  alignas(kCacheLine) uint8_t own[kUnpacks || !kFromMemory ? 1 : kInt4 ? Tile::prepared_bytes : Tile::decoded_bytes];

  constexpr int64_t V = VecTraits::kVectors;
  const auto multiply = [&](const typename VecTraits::Weights(&w)[S], const typename VecTraits::Positions(&p)[S])
                            __attribute__((always_inline)) {
#pragma GCC unroll 16
                              for (int t = 0; t < T; ++t) {
                                const auto x = VecTraits::broadcast(panel + t * kUnitBytes<VecTraits>);
#pragma GCC unroll 2
                                for (int s = 0; s < S; ++s)
                                  acc[t][s] = VecTraits::multiply_add(acc[t][s], w[s], p[s], x);
                              }
                            };
  const auto prefetch_group = [&](int64_t g) __attribute__((always_inline)) {
    constexpr int64_t group_bytes = Tile::block_bytes / kBlockGroups;
#pragma GCC unroll 5
    for (int64_t byte = 0; byte < group_bytes; byte += kCacheLine)
      __builtin_prefetch(weights + bytes_ahead<VecTraits, S, T>() + g * group_bytes + byte, 0, 2);
  };

  for (int64_t block = 0; block < blocks; ++block, weights += Tile::block_bytes) {
    if constexpr (kUnpacks) {
      Unpacked<VecTraits> unpacked[S];
      for_each_group(
          [&](auto group) __attribute__((always_inline)) {
            prefetch_group(group);
            typename VecTraits::Weights w[S];
            typename VecTraits::Positions p[S];
#pragma GCC unroll 2
            for (int s = 0; s < S; ++s) {
              p[s] = unpacked[s].template unpack<group>(weights, S, s);
              w[s] = unpacked[s].weights;
            }
            multiply(w, p);
            if constexpr ((group + 1) % V == 0) panel += T * kUnitBytes<VecTraits>;
          },
          kGroupsOfBlock);
    } else {
      const uint8_t* decoded = kFromMemory ? own : prepared;
      if constexpr (kFromMemory) kInt4 ? Tile::prepare(weights, own) : Tile::decode(weights, own);
      const uint8_t* expanded = decoded + Tile::decoded_bytes;
      for (int64_t unit = 0; unit < kBlockGroups; unit += V, panel += T * kUnitBytes<VecTraits>)
#pragma GCC unroll 4
        for (int64_t g = unit; g < unit + V; ++g) {
          if constexpr (kFromMemory) prefetch_group(g);
          typename VecTraits::Weights w[S];
          typename VecTraits::Positions p[S];
#pragma GCC unroll 2
          for (int s = 0; s < S; ++s, decoded += kDecodedBytes) {
            if constexpr (VecTraits::kExpands && kPrepared)
              w[s] = VecTraits::load_expanded(expanded + (g * S + s) * kExpandedBytes<VecTraits>);
            else
              w[s] = VecTraits::weights(weights + (g * S + s) * Tile::value_bytes);
            p[s] = VecTraits::load_positions(decoded);
          }
          multiply(w, p);
        }
    }
    if constexpr (!kFromMemory) prepared += Tile::prepared_bytes;
    if constexpr (VecTraits::kSumsBlocks)
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) acc[t][s] = VecTraits::add_block(acc[t][s]);
  }
  stream = {weights, prepared, panel};
}

template <class VecTraits, int S, int T>
[[gnu::always_inline]] inline void load_sums(const float* sums, typename VecTraits::Accumulators (&acc)[T][S]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) acc[t][s] = VecTraits::load(sums + (t * kTileStrips + s) * kStripRows);
}
template <class VecTraits, int S, int T>
[[gnu::always_inline]] inline void store_sums(float* sums, const typename VecTraits::Accumulators (&acc)[T][S]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) VecTraits::store(sums + (t * kTileStrips + s) * kStripRows, acc[t][s]);
}

// sums[token][strip] += the product over `blocks` blocks, for T tokens. If there is only one token block, the tile is
// read once, from memory, and its positions are decoded here (kFromMemory); else `stream.prepared` holds them.
template <class VecTraits, int S, int T, bool kFromMemory>
void accumulate(const Layout&, Stream stream, int64_t blocks, float* sums) {
  typename VecTraits::Accumulators acc[T][S];
  load_sums<VecTraits, S, T>(sums, acc);
  accumulate_blocks<VecTraits, S, T, kFromMemory>(stream, blocks, acc);
  store_sums<VecTraits, S, T>(sums, acc);
}

// The same with scales of groups: each section of blocks is summed up by itself and then multiplied by its scales.
template <class VecTraits, int S, int T, bool kFromMemory>
void accumulate_sections(const Layout& layout, Stream stream, int64_t blocks, float* sums) {
  constexpr bool kKeepsSums = T <= VecTraits::kTokensWithSums;  // in registers, beside the accumulators
  typename VecTraits::Accumulators acc[T][S], total[T][S];
  if constexpr (kKeepsSums) load_sums<VecTraits, S, T>(sums, total);
  for (int64_t block = 0; block < blocks; block += layout.section_blocks()) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) acc[t][s] = typename VecTraits::Accumulators{};
    accumulate_blocks<VecTraits, S, T, kFromMemory>(stream, layout.section_blocks(), acc);
    if constexpr (kFromMemory)  // the blocks' prefetches have left out the scales
      for (int64_t byte = 0; byte < S * layout.strip_scale_bytes(); byte += kCacheLine)
        __builtin_prefetch(stream.weights + bytes_ahead<VecTraits, S, T>() + byte, 0, 2);
    typename VecTraits::Accumulators scales[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s, stream.weights += layout.strip_scale_bytes())
      scales[s] = VecTraits::load_scales(stream.weights, layout.scale_dtype);
    if constexpr (!kKeepsSums) load_sums<VecTraits, S, T>(sums, total);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) total[t][s] = VecTraits::scaled(acc[t][s], scales[s], total[t][s]);
    if constexpr (!kKeepsSums) store_sums<VecTraits, S, T>(sums, total);
  }
  if constexpr (kKeepsSums) store_sums<VecTraits, S, T>(sums, total);
}

using Accumulate = void (*)(const Layout&, Stream, int64_t, float*);

template <class VecTraits, int S, bool kFromMemory, size_t... T>
Accumulate accumulate_for(int64_t tokens, std::index_sequence<T...>) {
  if constexpr (VecTraits::kGrouped) {
    static constexpr Accumulate table[] = {accumulate_sections<VecTraits, S, static_cast<int>(T) + 1, kFromMemory>...};
    return table[tokens - 1];
  } else {
    static constexpr Accumulate table[] = {accumulate<VecTraits, S, static_cast<int>(T) + 1, kFromMemory>...};
    return table[tokens - 1];
  }
}

// A pass of more tokens than the registers hold: for each chunk of columns, all tokens.
template <class VecTraits, int S>
void accumulate_chunks(const GemmArgs& args, int64_t tile, const TokenBlocks& tokens, const uint8_t* weights,
                       float* sums) {
  using Tile = TileStream<VecTraits, S>;
  constexpr auto sizes = std::make_index_sequence<VecTraits::kBlockTokens>();
  alignas(kCacheLine) uint8_t prepared[kChunkBlocks * Tile::prepared_bytes];
  const Layout& layout = args.layout;
  for (int64_t chunk = 0; chunk < layout.blocks(); chunk += kChunkBlocks) {
    const int64_t blocks = layout.blocks() - chunk < kChunkBlocks ? layout.blocks() - chunk : kChunkBlocks;
    const int64_t offset = layout.block_offset(chunk, S), next = layout.block_offset(chunk + kChunkBlocks, S);
    for (int64_t byte = 0; byte < next - offset; byte += kCacheLine) __builtin_prefetch(weights + next + byte, 0, 2);
    for (int64_t block = 0; block < blocks; ++block)
      Tile::prepare(weights + layout.block_offset(chunk + block, S), prepared + block * Tile::prepared_bytes);
    for (int64_t b = 0; b < tokens.count; ++b) {
      prefetch_output(args, tile, {tokens.first(b), tokens.size(b)}, chunk, chunk + blocks, layout.blocks());
      const uint8_t* panel = args.panel + panel_offset<VecTraits>(args, chunk, blocks, tokens.first(b));
      accumulate_for<VecTraits, S, false>(tokens.size(b), sizes)(layout, {weights + offset, prepared, panel}, blocks,
                                                                 sums + tokens.first(b) * kTileRows);
    }
  }
}

template <class VecTraits, int S>
void multiply_tile(const GemmArgs& args, int64_t tile) {
  alignas(kCacheLine) float sums[kMaxPassTokens * kTileRows];
  const Epilogue<VecTraits> epilogue(args, tile);
  for (int64_t t = 0; t < args.tokens; ++t)
    std::memcpy(sums + t * kTileRows, epilogue.initial, sizeof epilogue.initial);

  const uint8_t* weights = args.packed + args.layout.tile_offset(tile);
  const TokenBlocks tokens(args.tokens, VecTraits::kBlockTokens);
  if (tokens.count == 1)
    accumulate_for<VecTraits, S, true>(args.tokens, std::make_index_sequence<VecTraits::kBlockTokens>())(
        args.layout, {weights, nullptr, args.panel}, args.layout.blocks(), sums);
  else
    accumulate_chunks<VecTraits, S>(args, tile, tokens, weights, sums);
  epilogue.apply(sums, 0, args.tokens);
}

template <class VecTraits>
void multiply_tiles(const GemmArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (args.layout.strips_in(tile) == kTileStrips)
      multiply_tile<VecTraits, kTileStrips>(args, tile);
    else
      multiply_tile<VecTraits, 1>(args, tile);
  }
}

// Copies four channels of `tokens` tokens, a unit's group, to the panel. The pointers are locals because the panel's
// bytes may alias anything.
template <class VecTraits, class Value>
void pack_group(const Value* x, int64_t stride, const int32_t* c, int64_t tokens, int64_t group, uint8_t* unit) {
  const Value *x0 = x + c[0], *x1 = x + c[1], *x2 = x + c[2], *x3 = x + c[3];
  for (int64_t t = 0, i = 0; t < tokens; ++t, i += stride, unit += kUnitBytes<VecTraits>)
    VecTraits::store_channels(unit, group, x0[i], x1[i], x2[i], x3[i]);
}

// Copies the channels [first, last) of `tokens` tokens to the panel, in the order in which they are.
template <class VecTraits, class Value>
void pack_in_order(const Value* x, int64_t stride, const int32_t* x_rows, int64_t first, int64_t last, int64_t tokens,
                   uint8_t* panel) {
  for (int64_t t = 0; t < tokens; ++t) {
    const Value* from = x + (x_rows ? x_rows[t] : t) * stride;
    uint8_t* to = panel + t * kUnitBytes<VecTraits>;
    for (int64_t unit = first; unit < last; unit += 4 * VecTraits::kVectors, to += tokens * kUnitBytes<VecTraits>)
      for (int64_t g = 0, c = unit; g < VecTraits::kVectors; ++g, c += 4)
        VecTraits::store_channels(to, g, from[c], from[c + 1], from[c + 2], from[c + 3]);
  }
}

template <class VecTraits, class Value>
void pack_tokens_of(const GemmArgs& args, int64_t begin, int64_t end) {
  const TokenBlocks tokens(args.tokens, VecTraits::kBlockTokens);
  const int64_t all_blocks = args.layout.blocks(), stride = args.x_stride;
  for (int64_t b = begin; b < end; ++b) {
    const auto* x = static_cast<const Value*>(args.x);
    const int32_t* x_rows = args.x_rows ? args.x_rows + tokens.first(b) : nullptr;
    if (!x_rows) x += tokens.first(b) * stride;
    const int64_t size = tokens.size(b);
    for (int64_t chunk = 0; chunk < all_blocks; chunk += kChunkBlocks) {
      const int64_t blocks = all_blocks - chunk < kChunkBlocks ? all_blocks - chunk : kChunkBlocks;
      const int64_t first = chunk * 4 * kBlockGroups, last = first + blocks * 4 * kBlockGroups;
      uint8_t* panel = args.panel + panel_offset<VecTraits>(args, chunk, blocks, tokens.first(b));
      if (args.permutation)
        for (int64_t unit = first; unit < last; unit += 4 * VecTraits::kVectors, panel += size * kUnitBytes<VecTraits>)
          for (int64_t g = 0; g < VecTraits::kVectors; ++g)
            pack_group<VecTraits>(x, stride, args.permutation + unit + 4 * g, size, g, panel);
      else
        pack_in_order<VecTraits>(x, stride, x_rows, first, last, size, panel);
    }
  }
}

// Copies the tokens of some token blocks to the panel, with their channels in the order of the weight's columns.
template <class VecTraits>
void pack_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  with_activation<VecTraits>(args.act_dtype,
                             [&](auto value) { pack_tokens_of<VecTraits, decltype(value)>(args, begin, end); });
}

template <class VecTraits>
void round_values(Dtype dtype, const float* from, void* to, int64_t count) {
  with_activation<VecTraits>(
      dtype, [&](auto value) { VecTraits::store_from_float(static_cast<decltype(value)*>(to), from, count); });
}

template <class VecTraits>
constexpr Kernel row_kernel() {
  return {VecTraits::kBlockTokens, 1,
          VecTraits::kBlockTokens, VecTraits::kActivationBytes,
          pack_tokens<VecTraits>,  multiply_tiles<VecTraits>,
          round_values<VecTraits>};
}

struct RowKernels {
  template <class VecTraits>
  static constexpr Kernels of() {
    return {row_kernel<VecTraits>()};
  }
};

// For activations and weights of any dtype. Traits: of the dtype to which weights become, their own, a unit's groups,
// and whether there are scales for groups of columns.
template <class Make, template <class, Dtype, int64_t, bool> class Traits, int64_t V>
constexpr Products products_of_any() {
  return {{Make::template of<Traits<Bfloat16, Dtype::bfloat16, V, false>>(),
           Make::template of<Traits<Float16, Dtype::float16, V, false>>(),
           Make::template of<Traits<Float32, Dtype::float32, V, false>>(),
           Make::template of<Traits<Bfloat16, Dtype::int8, V, false>>(),
           Make::template of<Traits<Bfloat16, Dtype::int4, V, false>>()},
          {{},
           {},
           {},
           Make::template of<Traits<Bfloat16, Dtype::int8, V, true>>(),
           Make::template of<Traits<Bfloat16, Dtype::int4, V, true>>()}};
}

}  // namespace
