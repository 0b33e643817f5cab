// Copies tokens to the panel of gemm_amx.h, with their channels in the order of the weight's columns, and those of a
// group of 2:4 matrices in the order 2, 3, 0, 1 (amx_bf16.h says why).
//
// A permutation, channel by channel of each token by itself, takes a load and a store for each value. So 16 tokens are
// first transposed: then eight tokens of a channel are one load.
#pragma once
#include "gemm_amx.h"

namespace {

constexpr int64_t kStepColumns = 4 * kBlockGroups;

// What turns 0, 1, 2, 3 into the order of the channels, by exclusive or: 2, 3, 0, 1 of 2:4 matrices.
constexpr int64_t swapped(const Layout& layout) { return layout.pattern == 4 ? 2 : 0; }

// [tokens]: whether a token has an infinity or a NaN.
inline int32_t* is_not_finite(const AmxPanel& panel) { return reinterpret_cast<int32_t*>(panel.of_tokens()); }

inline bool has_not_finite(__m512i channels) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(channels, exponent), exponent) != 0;
}

// Each 128 bits of 16 vectors are 16 x 8 values. The number of a value is four bits for its vector and three for its
// place in it; `kSteps` rotate these seven bits, each by one.
template <int kSteps>
[[gnu::always_inline]] inline void rotate_places(__m512i (&rows)[16]) {
#pragma GCC unroll 4
  for (int step = 0; step < kSteps; ++step) {
    __m512i into[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      into[2 * i] = _mm512_unpacklo_epi16(rows[i], rows[i + 8]);
      into[2 * i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = into[i];
  }
}

// Where `transpose_step` puts a channel's tokens 0 to 7, in bytes. The tokens 8 to 15 are 64 bytes further.
constexpr int32_t transposed_offset(int32_t channel) {
  return channel / 32 * 1024 + channel % 8 * 128 + channel / 8 % 4 * 16;
}

// Transposes 32 channels of `tokens` tokens, at most 16, into 1 KiB.
inline void transpose_step(const uint16_t* const (&x)[kTileTokens], int64_t tokens, int64_t first, uint8_t* to) {
  __m512i rows[16];
  for (int64_t t = 0; t < kTileTokens; ++t) rows[t] = t < tokens ? _mm512_loadu_si512(x[t] + first) : __m512i{};
  rotate_places<4>(rows);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * kCacheLine, rows[i]);
}

// The 16 tokens of 32 channels, whose transposed tokens are at these offsets.
inline void gather_step(const uint8_t* transposed, const int32_t* offsets, __m512i (&tokens)[16]) {
  const auto load = [&](int64_t i) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(transposed + offsets[i / 2] + i % 2 * 64));
  };
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {  // the channels i / 2, 8 + i / 2, ... of the tokens 0 to 7, or 8 to 15
    __m512i row = _mm512_castsi128_si512(load(i));
    row = _mm512_inserti32x4(row, load(16 + i), 1);
    row = _mm512_inserti32x4(row, load(32 + i), 2);
    tokens[i] = _mm512_inserti32x4(row, load(48 + i), 3);
  }
  rotate_places<3>(tokens);
}

// Copies up to 16 tokens, in the order of a permutation.
struct PermutedTokens {
  const GemmArgs& args;
  int32_t* offsets = nullptr;  // of all channels
  uint8_t* transposed = nullptr;

  PermutedTokens(const GemmArgs& args, bool used) : args(args) {
    if (!used) return;
    const int64_t columns = args.layout.columns;
    transposed = quantized_scratch(columns * (kTileTokens * sizeof(uint16_t) + sizeof *offsets));
    offsets = reinterpret_cast<int32_t*>(transposed + columns * kTileTokens * sizeof(uint16_t));
    for (int64_t c = 0; c < columns; ++c) offsets[c] = transposed_offset(args.permutation[c ^ swapped(args.layout)]);
  }
  // `rows`: with padding.
  void copy(const uint16_t* const (&x)[kTileTokens], int64_t tokens, int64_t rows, int64_t stride, uint8_t* to,
            int32_t* not_finite) const {
    for (int64_t c = 0; c < args.layout.columns; c += kStepColumns)
      transpose_step(x, tokens, c, transposed + c * kTileTokens * sizeof(uint16_t));
    __mmask16 marks = 0;
    for (int64_t c = 0; c < args.layout.columns; c += kStepColumns, to += stride) {
      __m512i step[16];
      gather_step(transposed, offsets + c, step);
      for (int64_t t = 0; t < rows; ++t) {
        _mm512_storeu_si512(to + t * kStepBytes, step[t]);
        marks |= static_cast<__mmask16>(has_not_finite(step[t]) << t);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) not_finite[t] = marks >> t & 1;
  }
};

// Copies one token, channel by channel.
inline bool copy_token(const GemmArgs& args, const uint16_t* x, int64_t stride, uint8_t* to) {
  bool not_finite = false;
  for (int64_t c = 0; c < args.layout.columns; c += kStepColumns, to += stride) {
    alignas(kCacheLine) uint16_t gathered[kStepColumns];
    __m512i channels;
    if (args.permutation) {
      for (int64_t i = 0; i < kStepColumns; ++i) gathered[i] = x[args.permutation[c + (i ^ swapped(args.layout))]];
      channels = _mm512_load_si512(gathered);
    } else {
      channels = _mm512_loadu_si512(x + c);
      if (swapped(args.layout)) channels = _mm512_rol_epi64(channels, 32);
    }
    not_finite |= has_not_finite(channels);
    _mm512_storeu_si512(to, channels);
  }
  return not_finite;
}

// Copies the tokens of some token blocks to the panel, and marks those that are not finite.
inline void pack_bf16_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t min_transposed = 4;  // tokens; fewer are faster one by one
  const AmxPanel panel(args, kStepColumns);
  const TokenBlocks blocks = panel.blocks();
  const bool transposes = args.permutation && args.tokens >= min_transposed;
  const PermutedTokens permuted(args, transposes);
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = blocks.first(b); first < blocks.first(b) + blocks.size(b); first += kTileTokens) {
      const int64_t left = blocks.first(b) + blocks.size(b) - first, tokens = left < kTileTokens ? left : kTileTokens;
      const int64_t rows = panel.tile_tokens(), stride = panel.step_stride(b);
      uint8_t* to = panel.token(first, b);
      const uint16_t* x[kTileTokens];
      for (int64_t t = 0; t < tokens; ++t)
        x[t] =
            static_cast<const uint16_t*>(args.x) + (args.x_rows ? args.x_rows[first + t] : first + t) * args.x_stride;
      if (transposes) {
        permuted.copy(x, tokens, rows, stride, to, is_not_finite(panel) + first);
        continue;
      }
      for (int64_t t = 0; t < tokens; ++t)
        is_not_finite(panel)[first + t] = copy_token(args, x[t], stride, to + t * kStepBytes);
      for (int64_t step = 0; step < panel.steps; ++step)
        std::memset(to + step * stride + tokens * kStepBytes, 0, (rows - tokens) * kStepBytes);
    }
}

}  // namespace
