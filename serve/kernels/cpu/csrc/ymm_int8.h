// int8 activations in 256-bit vectors, 16 rows in two of them: with AVX-VNNI, or with AVX2 alone.
#pragma once
#include <immintrin.h>

#include "gemm_int8.h"
#include "ymm_masks.h"

namespace {

struct YmmInt8Traits {
  struct Two { __m256i low, high; };  // rows 0 to 7, and 8 to 15
  using Weights = Two;
  using Positions = Two;        // selectors of bytes within the eight
  using Activations = __m256i;  // the eight channels, four times
  using Accumulators = Two;
  static constexpr int64_t kBlockTokens = 3;
  static constexpr int64_t kStreamTokens = 3, kBlockSumTokens = 0;
  static constexpr int64_t kVectors = 1;
#if defined(__AVXVNNI__)
  static constexpr int kOffset = 128;  // vpdpbusd takes the activations as unsigned
#else
  static constexpr int kOffset = 0;
#endif

  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

  static Weights weights8(const uint8_t* p) { return {load(p), load(p + 32)}; }
  struct Multipliers { Two words, eights; };  // of 16 bits each, and 8 times those of each byte
  static Multipliers multipliers(const uint8_t* p) {
    const __m256i rows = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i words = _mm256_or_si256(rows, _mm256_slli_epi32(rows, 16)), low = _mm256_set1_epi16(15);
    const Two of_rows = {_mm256_and_si256(words, low), _mm256_and_si256(_mm256_srli_epi16(words, 4), low)};
    const __m256i eight = _mm256_set1_epi16(0x0808);
    return {of_rows, {_mm256_mullo_epi16(of_rows.low, eight), _mm256_mullo_epi16(of_rows.high, eight)}};
  }
  static Weights weights4(const uint8_t* p, const Multipliers& multipliers) {
    const __m256i both = load(p), mask = _mm256_set1_epi8(15);
    const auto times = [](__m256i plus_8, __m256i words, __m256i eights) {  // no byte reaches the next: 15 * 15 < 256
      return _mm256_sub_epi8(_mm256_mullo_epi16(plus_8, words), eights);
    };
    return {times(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), multipliers.words.low, multipliers.eights.low),
            times(_mm256_and_si256(both, mask), multipliers.words.high, multipliers.eights.high)};
  }
  static void store_weights(uint8_t* p, const Weights& w) { store(p, w.low), store(p + 32, w.high); }
  static Weights load_weights(const uint8_t* p) { return {load(p), load(p + 32)}; }
  static __m256i selectors(__m256i bits) {  // (bits & 3) | 4 for the second group
    return _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi8(3)), _mm256_set1_epi32(0x04040000));
  }
  static void positions(const uint8_t* p, Positions (&to)[1]) {
    const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    to[0] = {selectors(_mm256_srlv_epi32(four, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2))),
             selectors(_mm256_srlv_epi32(four, _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6)))};
  }
  static void store_positions(uint8_t* p, const Positions& positions) { store_weights(p, positions); }
  static Positions load_positions(const uint8_t* p) { return load_weights(p); }
  static Activations broadcast(const uint8_t* p) {
    int64_t eight;
    std::memcpy(&eight, p, sizeof eight);
    return _mm256_set1_epi64x(eight);
  }
  static Accumulators load_sums(const int32_t* p) { return {load(p), load(p + 8)}; }
  static void store_sums(int32_t* p, const Accumulators& sums) { store(p, sums.low), store(p + 8, sums.high); }
  // Adds the four products of each row.
  static __m256i dot(__m256i sums, __m256i x, __m256i w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, x, w);
#else
    // Unsigned by signed: |w| <= 128 and x with the sign of w, |x| <= 127. Two products fit 16 bits: 2 * 128 * 127.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  using Dense = __m256i;
  using DenseSums = __m256i;
  static constexpr int64_t kDenseBytes = 32, kDenseRows = 2;
  static Dense load_dense(const void* p) { return load(p); }
  static Dense offset() { return _mm256_set1_epi8(static_cast<char>(kOffset)); }
  static Dense load_digits(const void* p) { return _mm256_xor_si256(load(p), offset()); }
  static DenseSums dense_zero() { return _mm256_setzero_si256(); }
  static DenseSums dense_dot(DenseSums sums, Dense x, Dense w) { return dot(sums, x, w); }
  static int32_t total(DenseSums sums) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  static Accumulators multiply_add(const Accumulators& sums, const Weights& w, const Positions& p, Activations x) {
    return {dot(sums.low, _mm256_shuffle_epi8(x, p.low), w.low),
            dot(sums.high, _mm256_shuffle_epi8(x, p.high), w.high)};
  }
  static void halves_to_float(const uint8_t* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
    for (const int64_t end = i + count % 8; i < end; ++i) to[i] = half_to_float(from + 2 * i);
  }
  static void floats_to_half(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
};

// For 8:16 matrices.
struct YmmOf16Traits : YmmInt8Traits {
  static constexpr int64_t kVectors = 2;

  static void positions(const uint8_t* masks, Positions (&to)[2]) {
    const YmmPositions found = ymm_positions(masks);
    to[0] = {found.first_low, found.first_high};
    to[1] = {found.second_low, found.second_high};
  }
  static Activations broadcast(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
