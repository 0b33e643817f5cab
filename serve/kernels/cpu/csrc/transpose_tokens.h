// Permutes the channels of up to 16 tokens of bytes. Channel by channel of each token by itself, that is one load for
// each byte, from all over the cache. So the bytes are first transposed: then a channel's 16 tokens are one load.
#pragma once
#include "kernels.h"
#include "units.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

using namespace ria;

constexpr int64_t kTransposedTokens = 16;

#if defined(__SSE2__)
// Whether that is faster for so many tokens.
constexpr bool can_transpose(int64_t tokens) { return 6 <= tokens && tokens <= kTransposedTokens; }

inline __m128i load_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store_bytes(uint8_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

// to[channel][16] = x[16][channel]; the number of channels is a multiple of 16.
inline void transpose(const uint8_t* x, int64_t stride, int64_t channels, uint8_t* to) {
  for (int64_t c = 0; c < channels; c += 16, to += 16 * kTransposedTokens) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load_bytes(x + i * stride + c);
    // Each step takes the rows i and i + 8 for two neighbours, so that four steps turn all bytes into place.
    const auto step = [](const __m128i* from, __m128i* into) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        into[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
        into[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
      }
    };
    step(a, b), step(b, a), step(a, b), step(b, a);
    for (int i = 0; i < 16; ++i) store_bytes(to + i * kTransposedTokens, a[i]);
  }
}

// Copies the channels [first, last), in the order of the permutation, each eight `unit_stride` after the
// ones before and each of their tokens `token_stride`.
[[gnu::always_inline]] inline void gather_units(const uint8_t* x, const int32_t* permutation, int64_t first,
                                                int64_t last, int64_t tokens, int64_t unit_stride, int64_t token_stride,
                                                uint8_t* to) {
  for (int64_t c = first; c < last; c += kUnitChannels, to += unit_stride) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load_bytes(x + permutation[c + i] * kTransposedTokens);
    const auto step = [](const __m128i* from, __m128i* into) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        into[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 4]);
        into[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 4]);
      }
    };
    step(a, b), step(b, a), step(a, b);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {  // two tokens each
      if (token_stride == kUnitChannels && 2 * i + 1 < tokens) {
        store_bytes(to + i * 2 * kUnitChannels, b[i]);
        continue;
      }
      if (2 * i < tokens) _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * i * token_stride), b[i]);
      if (2 * i + 1 < tokens)
        _mm_storeh_pd(reinterpret_cast<double*>(to + (2 * i + 1) * token_stride), _mm_castsi128_pd(b[i]));
    }
  }
}
#else
constexpr bool can_transpose(int64_t) { return false; }
inline void transpose(const uint8_t*, int64_t, int64_t, uint8_t*) {}
inline void gather_units(const uint8_t*, const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t, uint8_t*) {}
#endif

}  // namespace
