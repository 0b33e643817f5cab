// AMX with activations that are rounded to int8, for gemm_amx.h: a step is two blocks of the packed form, 64 columns.
// Four columns become a row of a tile: a unit two rows, and one of 8:16 matrices four. Both sides are signed, so
// nothing is offset.
//
// The sums are exact, as those of gemm_int8.h. So both give the same bits, and few tokens take that one.
#pragma once
#include "avx512_vbmi2.h"
#include "gemm_amx.h"

namespace {

// For each of the 16 ways to keep two of four columns (a | b << 2), a row's selectors of the bytes of its two weights.
struct ByteSelectorTable {
  alignas(kCacheLine) uint32_t rows[16] = {};
  constexpr ByteSelectorTable() {
    for (int i = 0; i < 16; ++i)
      for (int column = 0; column < 4; ++column)
        rows[i] |= (column == (i & 3) ? 0u : column == i >> 2 ? 1u : 0x80u) << 8 * column;
  }
};
constexpr ByteSelectorTable kByteSelectorTable;

// Writes the two rows of a tile that a strip and unit become. `kept`: the positions of each row's four weights, in the
// lowest two bits of its four bytes.
[[gnu::always_inline]] inline void expand_unit(__m512i weights, __m512i kept, uint8_t* to) {
  const __m512i table = _mm512_load_si512(kByteSelectorTable.rows);
  const __m512i first_two = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const __m512i last_two = _mm512_set4_epi32(0x0e0e0e0e, 0x0a0a0a0a, 0x06060606, 0x02020202);
  // a | b << 2 of the first group in the lowest four bits, of the second from bit 16 on
  const __m512i groups =
      _mm512_ternarylogic_epi32(kept, _mm512_srli_epi32(kept, 6), _mm512_set1_epi32(0x00030003), 0xe4);
  const __m512i first = _mm512_permutexvar_epi32(groups, table);
  const __m512i second = _mm512_permutexvar_epi32(_mm512_srli_epi32(groups, 16), table);
  _mm512_store_si512(to, _mm512_shuffle_epi8(weights, _mm512_or_si512(first, first_two)));
  _mm512_store_si512(to + kCacheLine, _mm512_shuffle_epi8(weights, _mm512_or_si512(second, last_two)));
}

// The same of 8:16 matrices: the four rows that a strip and unit become.
[[gnu::always_inline]] inline void expand_unit_of_16(__m512i even, __m512i odd, const uint8_t* masks, uint8_t* to) {
  transpose_lanes(even, odd);                               // [rows][8]
  const auto expand = [&](__m512i weights, int64_t rows) {  // four of them, [row][16 columns]
    return _mm512_maskz_expand_epi8(mask_of_four(masks + 2 * rows), weights);
  };
  const auto upper = [](__m512i v) { return _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1)); };
  const __m512i a = expand(even, 0), b = expand(upper(even), 4), c = expand(odd, 8), d = expand(upper(odd), 12);
  const __m512i firsts = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                seconds = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  const auto store = [&](__m512i low, __m512i high, uint8_t* to) {  // [row][4 columns], twice, of the rows' halves
    _mm512_store_si512(to, _mm512_permutex2var_epi64(low, firsts, high));
    _mm512_store_si512(to + kCacheLine, _mm512_permutex2var_epi64(low, seconds, high));
  };
  store(_mm512_unpacklo_epi32(a, c), _mm512_unpacklo_epi32(b, d), to);
  store(_mm512_unpackhi_epi32(a, c), _mm512_unpackhi_epi32(b, d), to + 2 * kCacheLine);
}

// VecTraits: those of gemm_int8.h for the pattern.
template <class VecTraits, int kBits>
struct Int8Operands {
  using Product = int32_t;
  using Sum = int32_t;
  static constexpr Dtype kDtype = kBits == 8 ? Dtype::int8 : Dtype::int4;
  static constexpr bool kGrouped = false;
  static constexpr int64_t kStepBlocks = 2;

  template <int S, int T, int kPart, int kParts>
  [[gnu::always_inline]] static void expand(const Layout& layout, const ChunkSource& source, int64_t step,
                                            uint8_t* to) {
    using Stream = UnitStream<kBits, S>;
    const uint8_t* blocks = AmxTile<Int8Operands, S>::step(layout, source.weights, step);
    const uint8_t* multipliers = source.multipliers + step * kStepBlocks * kMultiplierBytes;
    constexpr int64_t V = VecTraits::kVectors, block_units = kBlockUnits / V;
    constexpr int64_t units = kStepBlocks * block_units, lines = kStepBlocks * Stream::block_bytes / kCacheLine;
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      StripWeights<VecTraits, kBits> weights;
#pragma GCC unroll 8
      for (int64_t unit = kPart * units / kParts; unit < (kPart + 1) * units / kParts; ++unit) {
        if (s == 0)
#pragma GCC unroll 4
          for (int64_t line = unit * lines / units; line < (unit + 1) * lines / units; ++line)
            __builtin_prefetch(blocks + kAmxPrefetchBytes[T - 1] + line * kCacheLine, 0, 2);
        const int64_t block = unit / block_units, slot = unit % block_units * V * S + s;
        if (unit == kPart * units / kParts || unit % block_units == 0)
          weights =
              StripWeights<VecTraits, kBits>(multipliers + s * layout.multiplier_bytes() + block * kMultiplierBytes);
        const uint8_t* values = blocks + block * Stream::block_bytes + slot * Stream::value_bytes;
        const uint8_t* positions =
            blocks + block * Stream::block_bytes + Stream::positions_offset + (slot + (V - 1) * s) * kUnitPositionBytes;
        uint8_t* tile_rows = to + s * kTileBytes + unit * V * 2 * kCacheLine;
        if constexpr (V == 2) {
          expand_unit_of_16(weights.of(values), weights.of(values + S * Stream::value_bytes), positions, tile_rows);
        } else {
          const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(positions)));
          const __m512i kept =
              _mm512_srlv_epi32(four, _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6));
          expand_unit(weights.of(values), kept, tile_rows);
        }
      }
    }
  }
  [[gnu::always_inline]] static void multiply_00() { _tile_dpbssd(0, 4, 6); }
  [[gnu::always_inline]] static void multiply_01() { _tile_dpbssd(1, 4, 7); }
  [[gnu::always_inline]] static void multiply_10() { _tile_dpbssd(2, 5, 6); }
  [[gnu::always_inline]] static void multiply_11() { _tile_dpbssd(3, 5, 7); }

  class Tile {
   public:
    Tile(const GemmArgs& args, int64_t tile) : args_(args), tile_(tile) {}
    const Sum* initial() const { return kZeroSums; }
    template <int S>
    void finish(const AmxPanel& panel, const Sum* sums) const {
      finish_tile<Avx512VnniTraits, 0>(args_, tile_, reinterpret_cast<const float*>(panel.of_tokens()), sums);
    }

   private:
    alignas(kCacheLine) static constexpr Sum kZeroSums[kTileRows] = {};
    const GemmArgs& args_;
    const int64_t tile_;
  };
};

// Rounds the tokens of some token blocks and copies them to the panel, with their channels in the order of the weight's
// columns.
inline void quantize_amx_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  const int64_t columns = args.layout.columns;
  const int64_t token_bytes = columns * (args.x_scales ? 1 : bits(args.act_dtype) / 8);
  const AmxPanel panel(args, kStepBytes);
  const TokenBlocks blocks = panel.blocks();
  const int64_t stride = columns + kCacheLine;  // not a power of two: all tokens would fall into one set of the cache
  uint8_t* rounded = quantized_scratch(kTransposedTokens * (stride + columns));
  uint8_t* transposed = rounded + kTransposedTokens * stride;
  float* scales = reinterpret_cast<float*>(panel.of_tokens());
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = blocks.first(b); first < blocks.first(b) + blocks.size(b); first += kTileTokens) {
      const int64_t left = blocks.first(b) + blocks.size(b) - first, size = left < kTileTokens ? left : kTileTokens;
      const int64_t padded = panel.tile_tokens(), step_stride = panel.step_stride(b);
      for (int64_t t = 0; t < size; ++t) {
        if (first + t + 1 < args.tokens) {  // while this one is rounded
          const uint8_t* next = token_of(args, first + t + 1);
          for (int64_t byte = 0; byte < token_bytes; byte += kCacheLine) __builtin_prefetch(next + byte, 0, 2);
        }
        scales[first + t] = quantized_token<Avx512VnniTraits, 0>(args, first + t, rounded + t * stride);
      }
      const bool transposes = args.permutation && can_transpose(size);
      if (transposes) transpose(rounded, stride, columns, transposed);
      uint8_t* to = panel.token(first, b);
      for (int64_t c = 0; c < columns; c += kStepBytes, to += step_stride) {
        if (transposes)
          gather_units(transposed, args.permutation, c, c + kStepBytes, size, kUnitChannels, kStepBytes, to);
        else if (args.permutation)
          for (int64_t t = 0; t < size; ++t)
            for (int64_t i = 0; i < kStepBytes; ++i)
              to[t * kStepBytes + i] = rounded[t * stride + args.permutation[c + i]];
        else
          for (int64_t t = 0; t < size; ++t) std::memcpy(to + t * kStepBytes, rounded + t * stride + c, kStepBytes);
        std::memset(to + size * kStepBytes, 0, (padded - size) * kStepBytes);
      }
    }
}

// Takes over from the loop of few tokens at `min_tokens`.
template <class VecTraits, int kBits>
constexpr Kernels amx_int8_kernels(int64_t min_tokens) {
  return {
      int8_kernel<VecTraits, kBits>().by_rows, min_tokens,
      amx_kernel(kUnitChannels / 2, quantize_amx_tokens, multiply_amx_tiles<Int8Operands<VecTraits, kBits>>, nullptr)};
}

template <class VecTraits>
constexpr Int8Products amx_int8_products() {  // measured
  constexpr int64_t min_tokens = VecTraits::kVectors == 2 ? 8 : 12;
  return {amx_int8_kernels<VecTraits, 8>(min_tokens), amx_int8_kernels<VecTraits, 4>(min_tokens)};
}

}  // namespace
