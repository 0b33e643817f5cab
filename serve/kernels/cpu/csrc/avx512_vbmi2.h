// What AVX-512 does with int8 activations and 8:16 matrices, with VBMI2 besides VNNI.
#pragma once
#include "avx512_vnni.h"

namespace {

struct Avx512Of16Traits : Avx512VnniTraits {
  static constexpr int64_t kVectors = 2;

  // The bits of four rows.
  static __mmask64 mask(const uint8_t* p) {
    __mmask64 bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  // Their eight positions each, then those of the next four.
  static __m512i positions_of_eight(const uint8_t* masks) {
    const __m512i columns = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return _mm512_inserti64x4(_mm512_maskz_compress_epi8(mask(masks), columns),
                              _mm512_castsi512_si256(_mm512_maskz_compress_epi8(mask(masks + 8), columns)), 1);
  }
  // Two lanes of each row, [even rows][2] and [odd rows][2], become one vector of all first lanes and one of the second
  // ones; or the other way round.
  static void transpose_lanes(__m512i& a, __m512i& b) {
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    const __m512i first = _mm512_ternarylogic_epi64(low, a, _mm512_slli_epi64(b, 32), 0xea);  // (low & a) | shifted
    b = _mm512_ternarylogic_epi64(low, b, _mm512_srli_epi64(a, 32), 0xae);                    // (~low & b) | shifted
    a = first;
  }
  static void positions(const uint8_t* masks, Positions (&to)[2]) {
    to[0] = positions_of_eight(masks);
    to[1] = positions_of_eight(masks + kStripRows);
    transpose_lanes(to[0], to[1]);
  }
  static Activations broadcast(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
