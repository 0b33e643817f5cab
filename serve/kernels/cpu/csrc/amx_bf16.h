// AMX with bfloat16 activations, for gemm_amx.h: a step is a block of the packed form, 32 columns.
//
// A zero that is written out would make NaN of an infinite activation. So tokens that are not finite are marked where
// they are packed, and multiplied by themselves.
//
// One or two tokens are not worth the zeros: AVX-512 multiplies them, with the same additions (FewTokensTraits).
#pragma once
#include "avx512_bf16.h"
#include "pack_bf16_tokens.h"

namespace {

// For each of the 16 ways to keep two of four channels (a | b << 2), a row's selectors of the bytes of its two weights:
// bit 7 says that a byte of the channels 0 and 1 is zero, bit 1 which weight it belongs to; bits 6 and 0 are the same
// of the channels 2 and 3.
struct SelectorTable {
  alignas(kCacheLine) uint32_t rows[16] = {};
  constexpr SelectorTable() {
    for (int i = 0; i < 16; ++i) {
      const int kept[2] = {i & 3, i >> 2};
      for (int channel = 0; channel < 4; ++channel) {
        const int which = channel == kept[0] ? 0 : channel == kept[1] ? 1 : -1;
        const uint32_t bits = which < 0 ? 0x40u : static_cast<uint32_t>(which);
        for (int byte = 0; byte < 2; ++byte)
          rows[i] |= (channel < 2 ? bits << 1 : bits) << 8 * (channel % 2 * 2 + byte);
      }
    }
  }
};
constexpr SelectorTable kSelectorTable;

// Writes the two rows of a tile that a strip and group become: their channels 2 and 3, then 0 and 1. `kept`: a | b << 2
// in the low four bits of each row's 32.
[[gnu::always_inline]] inline void expand_group(__m512i weights, __m512i kept, uint8_t* to) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0x82));
  const __m512i bytes = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
  const __m512i table = _mm512_load_si512(kSelectorTable.rows);
  const __m512i both = _mm512_permutexvar_epi32(kept, table);
  const __m512i low = _mm512_ternarylogic_epi32(both, mask, bytes, 0xea);  // (both & mask) | bytes
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_slli_epi32(both, 1), mask, bytes, 0xea);
  _mm512_store_si512(to, _mm512_shuffle_epi8(weights, high));
  _mm512_store_si512(to + kCacheLine, _mm512_shuffle_epi8(weights, low));
}

// What `expand_group` takes, of one group of a block.
template <class VecTraits, int kGroup>
[[gnu::always_inline]] inline __m512i kept_channels(const uint8_t* block, int64_t strips, int64_t strip) {
  if constexpr (VecTraits::kDtype == Dtype::int4) {
    // Words: the lowest two bits of each are a position.
    const __m512i words = Unpacked<VecTraits>().template unpack<kGroup>(block, strips, strip);
    return _mm512_ternarylogic_epi32(words, _mm512_srli_epi32(words, 14), _mm512_set1_epi32(3), 0xe4);
  } else {
    constexpr int64_t value_bytes = kStripRows * pair_bytes(VecTraits::kDtype);
    const uint8_t* positions = block + kBlockGroups * strips * value_bytes + (kGroup * strips + strip) * kPositionBytes;
    // Two broadcasts from memory, which take no shuffle.
    const __m512i lower = _mm512_broadcastd_epi32(_mm_loadu_si32(positions));
    return _mm512_srlv_epi32(_mm512_mask_broadcastd_epi32(lower, 0xff00, _mm_loadu_si32(positions + 4)),
                             _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  }
}

// Each 128 bits of four vectors are 4 x 4 pairs of words: rows become columns. Half of it by shifts, because everything
// else here wants the port for shuffles.
[[gnu::always_inline]] inline void transpose_pairs(__m512i (&v)[4]) {
  transpose_lanes(v[0], v[1]), transpose_lanes(v[2], v[3]);
  const __m512i even[2] = {v[0], v[2]}, odd[2] = {v[1], v[3]};
  v[0] = _mm512_unpacklo_epi64(even[0], even[1]), v[1] = _mm512_unpacklo_epi64(odd[0], odd[1]);
  v[2] = _mm512_unpackhi_epi64(even[0], even[1]), v[3] = _mm512_unpackhi_epi64(odd[0], odd[1]);
}

// Writes the eight rows of a tile that a strip and four groups of 8:16 matrices become. `masks`: which of its 16
// channels each row keeps.
[[gnu::always_inline]] inline void expand_four_groups(__m512i (&values)[4], const uint8_t* masks, uint8_t* to) {
  const auto mask = [&](int64_t first, int64_t second) __attribute__((always_inline)) {
    uint16_t of[2];
    std::memcpy(of, masks + mask_offset(first), sizeof *of);
    std::memcpy(of + 1, masks + mask_offset(second), sizeof *of);
    return static_cast<__mmask32>(of[0] | static_cast<uint32_t>(of[1]) << 16);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) values[i] = _mm512_rol_epi32(values[i], 16);  // in the order of the columns
  transpose_pairs(values);  // a row's eight side by side: those of the rows i, 4 + i, 8 + i and 12 + i
  __m512i low[4], high[4];  // the 16 columns of the rows i and 4 + i, and of 8 + i and 12 + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    low[i] = _mm512_maskz_expand_epi16(mask(i, 4 + i), values[i]);
    const __m512i upper = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(values[i], 1));
    high[i] = _mm512_maskz_expand_epi16(mask(8 + i, 12 + i), upper);
  }
  transpose_pairs(low), transpose_pairs(high);  // pairs of columns side by side, of four rows each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(to + i * kCacheLine, _mm512_shuffle_i32x4(low[i], high[i], 0x88));
    _mm512_store_si512(to + (4 + i) * kCacheLine, _mm512_shuffle_i32x4(low[i], high[i], 0xdd));
  }
}

// Expands a group of a block of S strips to [strip][tile]; of the groups of an 8:16 matrix every second one expands
// four, of one strip. kOnes: all weights are one.
template <class VecTraits, int S, int kGroup, bool kOnes = false>
[[gnu::always_inline]] inline void expand_in_block(const uint8_t* block, uint8_t* to) {
  constexpr int kFirst = kGroup / 4 * 4, strip = kGroup / 2 % 2;
  const auto weights = [&](auto group, int s) __attribute__((always_inline)) {
    return kOnes ? _mm512_set1_epi16(1) : weights_of_group<VecTraits, group>(block, S, s);
  };
  if constexpr (VecTraits::kVectors == 1) {
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s)
      expand_group(weights(std::integral_constant<int, kGroup>(), s), kept_channels<VecTraits, kGroup>(block, S, s),
                   to + s * kTileBytes + kGroup * 2 * kCacheLine);
  } else if constexpr (kGroup % 2 == 0 && strip < S) {
    constexpr Layout layout{1, 64, VecTraits::kDtype};
    __m512i four[4] = {weights(std::integral_constant<int, kFirst>(), strip),
                       weights(std::integral_constant<int, kFirst + 1>(), strip),
                       weights(std::integral_constant<int, kFirst + 2>(), strip),
                       weights(std::integral_constant<int, kFirst + 3>(), strip)};
    expand_four_groups(four, block + layout.masks_offset(kFirst, S, strip),
                       to + strip * kTileBytes + kFirst * 2 * kCacheLine);
  }
}

// Expands the groups from kFirst on of a block of S strips to [strip][tile].
template <class VecTraits, int S, int T, int kFirst, size_t... kGroups>
[[gnu::always_inline]] inline void expand_groups(const uint8_t* block, uint8_t* to, std::index_sequence<kGroups...>) {
  constexpr int64_t lines =
      S * kBlockGroups * (kStripRows * pair_bytes(VecTraits::kDtype) + kPositionBytes) / kCacheLine;
  const auto expand = [&](auto group) __attribute__((always_inline)) {
    for (int64_t line = group * lines / kBlockGroups; line < (group + 1) * lines / kBlockGroups; ++line)
      __builtin_prefetch(block + kAmxPrefetchBytes[T - 1] + line * kCacheLine, 0, 2);
    expand_in_block<VecTraits, S, group>(block, to);
  };
  (expand(std::integral_constant<int, kFirst + static_cast<int>(kGroups)>()), ...);
}

template <Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct Bf16Operands {
  using VecTraits = Avx512Bf16Traits<kType, kUnitGroups, kGroups>;
  using Product = float;
  using Sum = float;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kGrouped = kGroups;
  static constexpr int64_t kStepBlocks = 1;

  template <int S, int T, int kPart, int kParts>
  [[gnu::always_inline]] static void expand(const Layout& layout, const ChunkSource& source, int64_t step,
                                            uint8_t* to) {
    constexpr int count = static_cast<int>(kBlockGroups) / kParts;
    const uint8_t* block = AmxTile<Bf16Operands, S>::step(layout, source.weights, step);
    expand_groups<VecTraits, S, T, kPart * count>(block, to, std::make_index_sequence<count>());
  }
  [[gnu::always_inline]] static void multiply_00() { _tile_dpbf16ps(0, 4, 6); }
  [[gnu::always_inline]] static void multiply_01() { _tile_dpbf16ps(1, 4, 7); }
  [[gnu::always_inline]] static void multiply_10() { _tile_dpbf16ps(2, 5, 6); }
  [[gnu::always_inline]] static void multiply_11() { _tile_dpbf16ps(3, 5, 7); }
  static void load_scales(const Layout& layout, const uint8_t* from, float* to) {
    VecTraits::store(to, VecTraits::load_scales(from, layout.scale_dtype));
  }
  [[gnu::always_inline]] static __m512 scaled(const float* products, __m512 scales, __m512 sums) {
    return VecTraits::scaled(_mm512_load_ps(products), scales, sums);
  }

  class Tile {
   public:
    Tile(const GemmArgs& args, int64_t tile) : args_(args), tile_(tile), epilogue_(args, tile) {}
    const float* initial() const { return epilogue_.initial; }
    template <int S>
    void finish(const AmxPanel& panel, float* sums) const {
      const TokenBlocks blocks = panel.blocks();
      for (int64_t b = 0; b < blocks.count; ++b)
        for (int64_t t = blocks.first(b); t < blocks.first(b) + blocks.size(b); ++t)
          if (is_not_finite(panel)[t]) multiply_not_finite<S>(panel, panel.token(t, b), b, sums + t * kTileRows);
      epilogue_.apply(sums, 0, args_.tokens);
    }

   private:
    // The product of a token that is not finite: its channels that are, as for any token, and then the others, with the
    // weights that are kept.
    template <int S>
    void multiply_not_finite(const AmxPanel& panel, const uint8_t* token, int64_t token_block, float* sums) const {
      using Steps = AmxTile<Bf16Operands, S>;
      const Layout& layout = args_.layout;
      const uint8_t* weights = args_.packed + layout.tile_offset(tile_);
      alignas(kCacheLine) float products[kTileTokens * kTileRows], others[kTileRows], scales[kTileRows];
      const auto begin = [&](const float* from) {
        for (int64_t t = 0; t < panel.tile_tokens(); ++t) std::memcpy(products + t * kTileRows, from, sizeof others);
        std::memset(others, 0, sizeof others);
      };
      std::memcpy(sums, initial(), sizeof others);
      alignas(kCacheLine) constexpr float zeros[kTileRows] = {};
      begin(kGrouped ? zeros : sums);
      for (int64_t step = 0; step < panel.steps; ++step, token += panel.step_stride(token_block)) {
        multiply_channels<S>(layout, Steps::step(layout, weights, step), token, products, others);
        bool decided = true;  // whatever the other steps add, as soon as all rows are NaN
        for (int64_t r = 0; r < S * kStripRows; ++r) decided &= others[r] != others[r];
        if (decided) return std::memcpy(sums, others, S * kStripRows * sizeof *sums), void();
        if constexpr (kGrouped)
          if ((step + 1) % Steps::section_steps(layout) == 0) {
            Steps::load_scales(layout, weights, step / Steps::section_steps(layout), scales);
            for (int64_t r = 0; r < S * kStripRows; ++r) products[r] += others[r];
            add_scaled<Bf16Operands, S>(products, scales, 0, 1, sums);
            begin(zeros);
          }
      }
      if constexpr (!kGrouped)
        for (int64_t r = 0; r < S * kStripRows; ++r) sums[r] = products[r] + others[r];
    }
    // One step: the first row of `products` takes the finite channels, `others` take the rest.
    template <int S>
    static void multiply_channels(const Layout& layout, const uint8_t* step, const uint8_t* token, float* products,
                                  float* others) {
      alignas(kCacheLine) uint16_t x[kStepColumns], finite[kStepColumns];
      alignas(kCacheLine) uint8_t expanded[S * kTileBytes], kept[S * kTileBytes];
      std::memcpy(x, token, sizeof x);
      for (int64_t c = 0; c < kStepColumns; ++c) finite[c] = (x[c] & 0x7f80) == 0x7f80 ? 0 : x[c];
      expand<S, 1, 0, 1>(layout, {step, nullptr, 1}, 0, expanded);
      tile_barrier();
      load_tile_sums<1, S>(products);
      multiply_step<Bf16Operands, 1, S>(reinterpret_cast<const uint8_t*>(finite), 0, expanded);  // in every row
      store_tile_sums<1, S>(products);
      tile_barrier();
      if (std::memcmp(x, finite, sizeof x) == 0) return;
      for_each_group([&](auto group)
                         __attribute__((always_inline)) { expand_in_block<VecTraits, S, group, true>(step, kept); },
                     kGroupsOfBlock);
      for (int64_t c = 0; c < kStepColumns; ++c)
        for (int64_t s = 0; s < S && finite[c] != x[c]; ++s) {
          const auto of_channel = [&](const uint8_t* tiles) {  // a line has pairs of channels of 16 rows
            const __m512i pairs = _mm512_load_si512(tiles + s * kTileBytes + c / 2 * kCacheLine);
            return c % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)))
                         : _mm512_slli_epi32(pairs, 16);
          };
          const __m512 weights = _mm512_castsi512_ps(of_channel(expanded));
          const __m512i ones = of_channel(kept);
          float* to = others + s * kStripRows;
          _mm512_store_ps(to, _mm512_mask3_fmadd_ps(weights, _mm512_set1_ps(Bfloat16{x[c]}.to_float()),
                                                    _mm512_load_ps(to), _mm512_test_epi32_mask(ones, ones)));
        }
    }

    const GemmArgs& args_;
    const int64_t tile_;
    const Epilogue<VecTraits> epilogue_;
  };
};

// Few tokens by gemm_rows.h, with the additions of `tdpbf16ps`: it adds the products of a block's even channels and
// those of its odd ones, each with one rounding, in the order of the tile's rows; then both sums, and then the result
// to the sum so far. vdpbf16ps does the same with the pairs of two vectors of activations, of which one has zeros for
// the odd channels and one for the even ones. Of a pair it takes the second first: that is why the channels of a group
// are in the order 2, 3, 0, 1, and why the values of an 8:16 matrix are swapped instead.
template <Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct FewTokensTraits : Avx512Bf16Traits<kType, kUnitGroups, kGroups> {
  using Base = Avx512Bf16Traits<kType, kUnitGroups, kGroups>;
  using Value = typename Base::Value;
  struct Accumulators { __m512 sums{}, even{}, odd{}; };
  struct Activations { __m512i even, odd; };
  static constexpr int64_t kTokensWithSums = 2;
  static constexpr int64_t kBlockTokens = kType == Dtype::bfloat16 || kUnitGroups == 4 ? 2 : 1;  // measured
  static constexpr int64_t kActivationBytes = 16;
  static constexpr bool kSumsBlocks = true;

  static void store_channels(uint8_t* unit, int64_t group, Value a, Value b, Value c, Value d) {
    const uint64_t halves[2] = {a.bits | static_cast<uint64_t>(c.bits) << 32,
                                static_cast<uint64_t>(b.bits) << 16 | static_cast<uint64_t>(d.bits) << 48};
    for (int64_t i = 0; i < 2; ++i)
      std::memcpy(unit + (i * kUnitGroups + group) * sizeof *halves, halves + i, sizeof *halves);
  }
  static Activations broadcast(const uint8_t* p) { return {Base::broadcast(p), Base::broadcast(p + 8 * kUnitGroups)}; }
  static Accumulators load(const float* p) { return {Base::load(p)}; }
  static void store(float* p, const Accumulators& acc) { Base::store(p, acc.sums); }
  static Accumulators multiply_add(const Accumulators& acc, __m512i w, __m512i p, const Activations& x) {
    return {acc.sums, Base::multiply_add(acc.even, w, p, x.even), Base::multiply_add(acc.odd, w, p, x.odd)};
  }
  static Accumulators add_block(const Accumulators& acc) {
    return {_mm512_add_ps(acc.sums, _mm512_add_ps(acc.even, acc.odd))};
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) { return {Base::load_scales(p, dtype)}; }
  static Accumulators scaled(const Accumulators& acc, const Accumulators& scales, const Accumulators& initial) {
    return {Base::scaled(acc.sums, scales.sums, initial.sums)};
  }
};

template <Dtype kType, int64_t V, bool kGroups = false>
constexpr Kernels amx_bf16_kernels() {
  using FewTokens = FewTokensTraits<kType, V, kGroups>;
  return {row_kernel<FewTokens>(), FewTokens::kBlockTokens + 1,
          amx_kernel(4 * sizeof(uint16_t), pack_bf16_tokens, multiply_amx_tiles<Bf16Operands<kType, V, kGroups>>,
                     round_values<FewTokens>)};
}

template <int64_t V>
constexpr Products amx_bf16_products() {
  return {{amx_bf16_kernels<Dtype::bfloat16, V>(),
           {},
           {},
           amx_bf16_kernels<Dtype::int8, V>(),
           amx_bf16_kernels<Dtype::int4, V>()},
          {{}, {}, {}, amx_bf16_kernels<Dtype::int8, V, true>(), amx_bf16_kernels<Dtype::int4, V, true>()}};
}

}  // namespace
