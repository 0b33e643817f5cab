// What AVX-512 does with int8 activations and 8:16 matrices, with VBMI2 besides VNNI.
#pragma once
#include "avx512_vnni.h"

namespace {

struct Avx512Of16Traits : Avx512VnniTraits {
  static constexpr int64_t kVectors = 2;

  // Where the bits of four rows, `mask`, are set: eight bytes for each row, between 0 and 15.
  static __m512i set_bits(const uint8_t* mask) {
    const __m512i columns = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    uint64_t bits;
    std::memcpy(&bits, mask, sizeof bits);
    return _mm512_maskz_compress_epi8(bits, columns);
  }
  static __m512i both(__m512i low, __m512i high) {
    return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }
  static void positions(const uint8_t* masks, Positions (&to)[2]) {
    const __m512i first = both(set_bits(masks), set_bits(masks + 8));  // the rows 0, 4, 8, 12, 1, 5, 9, 13
    const __m512i second = both(set_bits(masks + 16), set_bits(masks + 24));
    const __m512i rows = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
    to[0] = _mm512_permutex2var_epi32(first, rows, second);
    to[1] = _mm512_permutex2var_epi32(first, _mm512_or_si512(rows, _mm512_set1_epi32(1)), second);
  }
  static Activations broadcast(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
