// What AVX-512 F, BW, VL, DQ and VNNI do with int8 activations: the traits of gemm_int8.h. The kernels for AMX
// (amx_int8.h) round tokens and finish tiles with them, too.
#pragma once
#include <immintrin.h>

#include "gemm_int8.h"

namespace {

struct Avx512VnniTraits {
  using Weights = __m512i;
  using Positions = __m512i;    // selectors of bytes within the eight
  using Activations = __m512i;  // the eight channels, eight times
  using Accumulators = __m512i;
  static constexpr int64_t kBlockTokens = 12;
  static constexpr int64_t kStreamTokens = 8, kBlockSumTokens = 4;
  static constexpr int64_t kVectors = 1;
  static constexpr int kOffset = 128;  // vpdpbusd takes the activations as unsigned

  static Weights weights8(const uint8_t* p) { return _mm512_loadu_si512(p); }
  struct Multipliers { __m512i words, eights; };  // of 16 bits each, and 8 times those of each byte
  static Multipliers multipliers(const uint8_t* p) {
    const __m512i lanes = row_multipliers(p), words = _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16));
    return {words, _mm512_mullo_epi16(words, _mm512_set1_epi16(0x0808))};
  }
  static __m512i twice(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int kHalf>
  static __m512i four_in_half() {  // the other one's are 0
    return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), kHalf);
  }
  static Weights weights4(const uint8_t* p, const Multipliers& multipliers) {
    const __m512i plus_8 = _mm512_and_si512(_mm512_srlv_epi32(twice(p), four_in_half<0>()), _mm512_set1_epi8(15));
    // No product of a byte reaches the next one: 15 * 15 < 256.
    return _mm512_sub_epi8(_mm512_mullo_epi16(plus_8, multipliers.words), multipliers.eights);
  }
  static Weights sixteenfold(const uint8_t* p) {  // (shifted & 0xf0) ^ 0x80, as 16 * 8 is stored too much
    return _mm512_ternarylogic_epi32(_mm512_sllv_epi32(twice(p), four_in_half<1>()), _mm512_set1_epi8('\xf0'),
                                     _mm512_set1_epi8('\x80'), 0x6a);
  }
  static Accumulators row_multipliers(const uint8_t* p) {
    int64_t both;
    std::memcpy(&both, p, sizeof both);
    const __m512i bytes =
        _mm512_setr_epi64(0xffffff01ffffff00, 0xffffff03ffffff02, 0xffffff05ffffff04, 0xffffff07ffffff06,
                          0xffffff01ffffff00, 0xffffff03ffffff02, 0xffffff05ffffff04, 0xffffff07ffffff06);
    const __m512i lanes = _mm512_shuffle_epi8(_mm512_set1_epi64(both), bytes);
    return _mm512_and_si512(_mm512_srlv_epi32(lanes, four_in_half<1>()), _mm512_set1_epi32(15));
  }
  static Accumulators add_block(Accumulators sums, Accumulators block, Accumulators multipliers) {
    return _mm512_add_epi32(sums, _mm512_mullo_epi32(_mm512_srai_epi32(block, 4), multipliers));
  }
  static void store_weights(uint8_t* p, Weights w) { _mm512_store_si512(p, w); }
  static Weights load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
  static void positions(const uint8_t* p, Positions (&to)[1]) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    // (shifted & 3) | 4 for the second group
    to[0] = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(four, shifts), _mm512_set1_epi8(3),
                                      _mm512_set1_epi32(0x04040000), 0xea);
  }
  static void store_positions(uint8_t* p, Positions positions) { _mm512_store_si512(p, positions); }
  static Positions load_positions(const uint8_t* p) { return _mm512_load_si512(p); }
  static Activations broadcast(const uint8_t* p) {
    int64_t eight;
    std::memcpy(&eight, p, sizeof eight);
    return _mm512_set1_epi64(eight);
  }
  static Accumulators load_sums(const int32_t* p) { return _mm512_load_si512(p); }
  static void store_sums(int32_t* p, Accumulators sums) { _mm512_store_si512(p, sums); }
  static Accumulators multiply_add(Accumulators sums, Weights w, Positions p, Activations x) {
    return _mm512_dpbusd_epi32(sums, _mm512_shuffle_epi8(x, p), w);
  }
  using Dense = __m512i;
  using DenseSums = __m512i;
  static constexpr int64_t kDenseBytes = 64, kDenseRows = 4;
  static Dense load_dense(const void* p) { return _mm512_loadu_si512(p); }
  static Dense offset() { return _mm512_set1_epi8(static_cast<char>(kOffset)); }
  static Dense load_digits(const void* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), offset()); }
  static DenseSums dense_zero() { return _mm512_setzero_si512(); }
  static DenseSums dense_dot(DenseSums sums, Dense x, Dense w) { return _mm512_dpbusd_epi32(sums, x, w); }
  static int32_t total(DenseSums sums) { return _mm512_reduce_add_epi32(sums); }
  static void halves_to_float(const uint8_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kStripRows) {
      const int64_t left = count - i;
      const __mmask16 lanes = static_cast<__mmask16>(left < kStripRows ? (1u << left) - 1 : 0xffff);
      _mm512_mask_storeu_ps(to + i, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from + 2 * i)));
    }
  }
  static void floats_to_half(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kStripRows)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_cvtps_ph(_mm512_load_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
