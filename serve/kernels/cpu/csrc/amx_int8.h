// AMX with activations that are rounded to int8, for gemm_amx.h: a step is two blocks of the packed form, 64 columns.
// Four columns become a row of a tile: a unit two rows, and one of 8:16 matrices four. Both sides are signed, so
// nothing is offset.
//
// The sums are exact, as those of gemm_int8.h, and those of sections are scaled and added up in the same way. So both
// give the same bits, and few tokens take that one.
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
template <int kBits>
[[gnu::always_inline]] inline void expand_unit_of_16(const uint8_t* first, const uint8_t* second, const uint8_t* masks,
                                                     uint8_t* to) {
  using Traits = Avx512Of16Traits;
  __m512i even = weights_of<Traits, kBits>(first), odd = weights_of<Traits, kBits>(second);
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

// int4 weights are multiplied by 16, as in gemm_int8.h. `kHalves`: sections are half a step. VecTraits: those of
// gemm_int8.h for the pattern.
template <class VecTraits, int kBits, bool kSections = false, bool kHalves = false>
struct Int8Operands {
  using Product = int32_t;
  using Sum = ::Sum<kSections>;
  static constexpr Dtype kDtype = kBits == 8 ? Dtype::int8 : Dtype::int4;
  static constexpr bool kGrouped = kSections;
  static constexpr int64_t kStepBlocks = 2;
  static constexpr int64_t kSlices = kHalves ? 2 : 1;

  template <int S, int T, int kPart, int kParts>
  [[gnu::always_inline]] static void expand(const Layout& layout, const uint8_t* step, uint8_t* to) {
    using Stream = UnitStream<kBits, S>;
    const int64_t block_bytes = Stream::block_bytes + (kHalves ? S * layout.strip_scale_bytes() : 0);
    constexpr int64_t V = VecTraits::kVectors, block_units = kBlockUnits / V;
    constexpr int64_t units = kStepBlocks * block_units, lines = kStepBlocks * Stream::block_bytes / kCacheLine;
#pragma GCC unroll 8
    for (int64_t unit = kPart * units / kParts; unit < (kPart + 1) * units / kParts; ++unit) {
      const uint8_t* block = step + unit / block_units * block_bytes;
#pragma GCC unroll 4
      for (int64_t line = unit * lines / units; line < (unit + 1) * lines / units; ++line)
        __builtin_prefetch(step + kAmxPrefetchBytes[T - 1] + line * kCacheLine, 0, 2);
#pragma GCC unroll 2
      for (int64_t s = 0; s < S; ++s) {
        const int64_t slot = unit % block_units * V * S + s;
        const uint8_t *values = Stream::values(block, slot), *positions = Stream::positions(block, slot + (V - 1) * s);
        uint8_t* tile_rows = to + s * kTileBytes + unit * V * 2 * kCacheLine;
        if constexpr (V == 2) {
          expand_unit_of_16<kBits>(values, Stream::values(block, slot + S), positions, tile_rows);
        } else {
          const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(positions)));
          const __m512i kept =
              _mm512_srlv_epi32(four, _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6));
          expand_unit(weights_of<VecTraits, kBits>(values), kept, tile_rows);
        }
      }
    }
  }
  [[gnu::always_inline]] static void multiply_00() { _tile_dpbssd(0, 4, 6); }
  [[gnu::always_inline]] static void multiply_01() { _tile_dpbssd(1, 4, 7); }
  [[gnu::always_inline]] static void multiply_10() { _tile_dpbssd(2, 5, 6); }
  [[gnu::always_inline]] static void multiply_11() { _tile_dpbssd(3, 5, 7); }

  static void load_scales(const Layout& layout, const uint8_t* from, float* to) {
    ::load_scales<Avx512VnniTraits, kBits>(layout, from, kStripRows, to);
  }
  [[gnu::always_inline]] static __m512 scaled(const int32_t* products, __m512 scales, __m512 sums) {
    return Avx512VnniTraits::scaled(Avx512VnniTraits::load_sums(products), scales, sums);
  }

  class Tile {
   public:
    Tile(const GemmArgs& args, int64_t tile) : args_(args), tile_(tile) {}
    const Sum* initial() const { return kZeroSums; }
    template <int S>
    void finish(const AmxPanel& panel, const Sum* sums) const {
      finish_tile<Avx512VnniTraits, kBits, kSections>(args_, tile_, reinterpret_cast<const float*>(panel.of_tokens()),
                                                      kNoOffsets, sums);
    }

   private:
    alignas(kCacheLine) static constexpr Sum kZeroSums[kTileRows] = {};
    static constexpr int32_t kNoOffsets[kTileRows] = {};
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
template <class VecTraits, int kBits, bool... kKind>
constexpr Kernels amx_int8_kernels(int64_t min_tokens) {
  using Operands = Int8Operands<VecTraits, kBits, kKind...>;
  return {int8_kernel<VecTraits, kBits, Operands::kGrouped>().by_rows, min_tokens,
          amx_kernel(kUnitChannels / 2, quantize_amx_tokens, multiply_amx_tiles<Operands>, nullptr)};
}

template <class VecTraits, int kBits>
constexpr Int8Products::ByScales amx_int8_kernels_by_scales() {  // measured
  constexpr bool of_16 = VecTraits::kVectors == 2;
  return {amx_int8_kernels<VecTraits, kBits>(of_16 ? 8 : 12), amx_int8_kernels<VecTraits, kBits, true>(of_16 ? 13 : 18),
          amx_int8_kernels<VecTraits, kBits, true, true>(44)};
}

template <class VecTraits>
constexpr Int8Products amx_int8_products() {
  return {amx_int8_kernels_by_scales<VecTraits, 8>(), amx_int8_kernels_by_scales<VecTraits, 4>()};
}

}  // namespace
