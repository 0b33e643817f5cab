// Rounds tokens to int8 and copies them to the panel, with their channels in the order of the weight's columns.
//
// A token's scale is its largest magnitude / 127, and a channel becomes the integer nearest to x * (127 / largest): its
// magnitude needs no clamp, because the product is at most 127 and a rounding error. A token with a NaN or an infinity
// gets a scale that is no number, or an infinite one and zeros: all its outputs become NaN.
#pragma once
#include <cfloat>
#include <cstring>

#include "scalar.h"
#include "transpose_tokens.h"
#include "units.h"

namespace {

using namespace ria;

constexpr int64_t kPreparedBytes = 64;  // weights, or positions, of a strip and unit, as the instructions take them
// Blocks of columns in a chunk: its prepared weights and its activations stay in L1 for all tokens of a pass.
constexpr int64_t kInt8ChunkBlocks = 8;

alignas(kCacheLine) constexpr int32_t kZeros[kStripRows] = {};

inline float half_to_float(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return Float16{half}.to_float();
}

// Conversions of `count` values of any activation's dtype, at any address.
inline void bfloat16s_to_float(const uint8_t* from, float* __restrict to, int64_t count) {
  constexpr int64_t step = 16;  // a constant number, so that it becomes one vector
  const auto convert = [&](int64_t i) {
    uint16_t value;
    std::memcpy(&value, from + 2 * i, sizeof value);
    to[i] = Bfloat16{value}.to_float();
  };
  int64_t i = 0;
  for (; i + step <= count; i += step)
    for (int64_t j = i; j < i + step; ++j) convert(j);
  for (const int64_t end = i + count % step; i < end; ++i) convert(i);
}

template <class VecTraits>
void load_floats(Dtype dtype, const uint8_t* from, float* to, int64_t count) {
  if (dtype == Dtype::float32)
    std::memcpy(to, from, count * sizeof(float));
  else if (dtype == Dtype::bfloat16)
    bfloat16s_to_float(from, to, count);
  else
    VecTraits::halves_to_float(from, to, count);
}

template <class T>
void copy_rows(const T* from, uint8_t* to, int64_t count) {
  if (count == kTileRows)  // a constant number of bytes
    std::memcpy(to, from, kTileRows * sizeof(T));
  else
    std::memcpy(to, from, count * sizeof(T));
}

// Rounds the first `count` of a tile's rows. `from` is on a cache line and has all of them.
template <class VecTraits>
void store_floats(Dtype dtype, const float* from, uint8_t* to, int64_t count) {
  if (dtype == Dtype::float32) {
    copy_rows(from, to, count);
    return;
  }
  alignas(kCacheLine) uint16_t rounded[kTileRows];
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const uint32_t b = bits_of(from[i]), up = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
      rounded[i] = static_cast<uint16_t>(from[i] == from[i] ? up : 0x7fc0);
    }
  } else {
    VecTraits::floats_to_half(from, rounded, kTileRows);
  }
  copy_rows(rounded, to, count);
}

// The same for any number of rows; `from` has whole tiles of them.
template <class VecTraits>
void store_all_floats(Dtype dtype, const float* from, void* to, int64_t count) {
  for (int64_t first = 0; first < count; first += kTileRows)
    store_floats<VecTraits>(dtype, from + first, static_cast<uint8_t*>(to) + first * bits(dtype) / 8,
                            count - first < kTileRows ? count - first : kTileRows);
}

// The bits of the largest magnitude. They are in the order of the magnitudes, with NaNs above infinity.
template <class Bits>
Bits largest_bits(const uint8_t* x, int64_t count) {
  constexpr Bits magnitude = static_cast<Bits>(-1) >> 1;
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i * sizeof bits, sizeof bits);
    bits &= magnitude;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

inline float largest_magnitude(Dtype dtype, const uint8_t* x, int64_t count) {
  if (dtype == Dtype::float32) return float_from_bits(largest_bits<uint32_t>(x, count));
  const uint16_t largest = largest_bits<uint16_t>(x, count);
  return dtype == Dtype::bfloat16 ? Bfloat16{largest}.to_float() : Float16{largest}.to_float();
}

// Rounds a token's channels, a multiple of 64, to int8 and adds kOffset. Returns the token's scale.
template <class VecTraits, int kOffset = VecTraits::kOffset>
float quantize_token(Dtype dtype, const uint8_t* x, int64_t columns, uint8_t* to) {
  constexpr int64_t step = 64;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float largest = largest_magnitude(dtype, x, columns);
  const float inverse = largest == 0 ? 0.0f : 127.0f / largest;
  const float factor = inverse > FLT_MAX ? FLT_MAX : inverse;  // infinite for the smallest numbers
  alignas(kCacheLine) float values[step];
  for (int64_t c = 0; c < columns; c += step) {
    load_floats<VecTraits>(dtype, x + c * bits(dtype) / 8, values, step);
    for (int64_t i = 0; i < step; ++i) to[c + i] = static_cast<uint8_t>(bits_of(values[i] * factor + round) ^ kOffset);
  }
  return largest == 0 ? 1.0f : largest / 127.0f;
}

// A token of the pass.
inline const uint8_t* token_of(const GemmArgs& args, int64_t token) {
  const int64_t item = args.x_scales ? 1 : bits(args.act_dtype) / 8;
  return static_cast<const uint8_t*>(args.x) + (args.x_rows ? args.x_rows[token] : token) * args.x_stride * item;
}

// Its channels as quantize_token gives them, even if they are rounded already.
template <class VecTraits, int kOffset = VecTraits::kOffset>
float quantized_token(const GemmArgs& args, int64_t token, uint8_t* to) {
  const uint8_t* x = token_of(args, token);
  if (!args.x_scales) return quantize_token<VecTraits, kOffset>(args.act_dtype, x, args.layout.columns, to);
  for (int64_t c = 0; c < args.layout.columns; ++c) to[c] = static_cast<uint8_t>(x[c] ^ kOffset);
  return args.x_scales[args.x_rows ? args.x_rows[token] : token];
}

// Byte offset, in the panel, of a token block's activations for a chunk that starts at the block `first` of columns.
// Within a chunk one token block follows another, each [unit][token][channels of a unit].
constexpr int64_t int8_panel_offset(int64_t tokens, int64_t first, int64_t blocks, int64_t first_token) {
  return (first * tokens + blocks * first_token) * kBlockUnits * kUnitChannels;
}

// The tokens' scales follow their activations in the panel.
inline float* token_scales_of(const GemmArgs& args) {
  return reinterpret_cast<float*>(args.panel + args.tokens * args.layout.columns);
}

// Copies eight channels of `tokens` tokens to units of kChannels.
template <int64_t kChannels>
void copy_eight(const uint8_t* x, int64_t stride, const int32_t* c, int64_t tokens, uint8_t* to) {
  const uint8_t *x0 = x + c[0], *x1 = x + c[1], *x2 = x + c[2], *x3 = x + c[3];
  const uint8_t *x4 = x + c[4], *x5 = x + c[5], *x6 = x + c[6], *x7 = x + c[7];
  for (int64_t t = 0, i = 0; t < tokens; ++t, i += stride, to += kChannels) {
    const uint32_t low = x0[i] | x1[i] << 8 | x2[i] << 16 | static_cast<uint32_t>(x3[i]) << 24;
    const uint32_t high = x4[i] | x5[i] << 8 | x6[i] << 16 | static_cast<uint32_t>(x7[i]) << 24;
    const uint64_t eight = low | static_cast<uint64_t>(high) << 32;
    std::memcpy(to, &eight, sizeof eight);
  }
}

// Copies the units of the channels [first, last) of `tokens` tokens, in the order of the permutation, or as they are.
template <int64_t kChannels>
void copy_units(const uint8_t* x, int64_t stride, const int32_t* permutation, int64_t first, int64_t last,
                int64_t tokens, uint8_t* to) {
  for (int64_t c = first; c < last; c += kChannels, to += tokens * kChannels) {
    if (permutation)
      for (int64_t i = 0; i < kChannels; i += kUnitChannels)
        copy_eight<kChannels>(x, stride, permutation + c + i, tokens, to + i);
    else
      for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * kChannels, x + t * stride + c, kChannels);
  }
}

// The panel's chunks of a token block: calls copy(first, last, to) for each, with its channels and its place.
template <class Copy>
void for_each_chunk(const GemmArgs& args, int64_t first_token, const Copy& copy) {
  const int64_t all = args.layout.blocks();
  for (int64_t first = 0; first < all; first += kInt8ChunkBlocks) {
    const int64_t blocks = all - first < kInt8ChunkBlocks ? all - first : kInt8ChunkBlocks;
    copy(first * 4 * kBlockGroups, (first + blocks) * 4 * kBlockGroups,
         args.panel + int8_panel_offset(args.tokens, first, blocks, first_token));
  }
}

// Rounds the tokens of some token blocks and copies them to the panel.
template <class VecTraits, int64_t kBlockTokens>
void quantize_tokens(const GemmArgs& args, int64_t begin, int64_t end) {
  const TokenBlocks tokens(args.tokens, kBlockTokens);
  const int64_t columns = args.layout.columns;
  constexpr int64_t unit = VecTraits::kVectors * kUnitChannels;
  const int64_t stride = columns + kCacheLine;  // not a power of two: all tokens would fall into one set of the cache
  uint8_t* rounded = quantized_scratch(kTransposedTokens * (stride + columns));
  uint8_t* transposed = rounded + kTransposedTokens * stride;
  float* scales = token_scales_of(args);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first_token = tokens.first(b), size = tokens.size(b);
    for (int64_t t = 0; t < size; ++t)
      scales[first_token + t] = quantized_token<VecTraits>(args, first_token + t, rounded + t * stride);
    if (args.permutation && can_transpose(size)) {
      transpose(rounded, stride, columns, transposed);
      for_each_chunk(args, first_token, [&](int64_t first, int64_t last, uint8_t* to) {
        for (int64_t c = first; c < last; c += unit, to += size * unit)
          gather_units(transposed, args.permutation, c, c + unit, size, kUnitChannels, unit, to);
      });
    } else {
      for_each_chunk(args, first_token, [&](int64_t first, int64_t last, uint8_t* to) {
        copy_units<unit>(rounded, stride, args.permutation, first, last, size, to);
      });
    }
  }
}

}  // namespace
