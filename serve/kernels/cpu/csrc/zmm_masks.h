// The positions of what an 8:16 matrix keeps, with AVX-512 VBMI2.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "layout.h"

namespace {

// The bits of four rows.
inline __mmask64 mask_of_four(const uint8_t* p) {
  __mmask64 bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
// Their eight positions each, then those of the next four.
inline __m512i positions_of_eight(const uint8_t* masks) {
  const __m512i columns = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_inserti64x4(_mm512_maskz_compress_epi8(mask_of_four(masks), columns),
                            _mm512_castsi512_si256(_mm512_maskz_compress_epi8(mask_of_four(masks + 8), columns)), 1);
}
// Two lanes of each row, [even rows][2] and [odd rows][2], become one vector of all first lanes and one of the second
// ones; or the other way round.
inline void transpose_lanes(__m512i& a, __m512i& b) {
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i first = _mm512_ternarylogic_epi64(low, a, _mm512_slli_epi64(b, 32), 0xea);  // (low & a) | shifted
  b = _mm512_ternarylogic_epi64(low, b, _mm512_srli_epi64(a, 32), 0xae);                    // (~low & b) | shifted
  a = first;
}
// Of the 16 rows of a strip: 32 bits for each, the four bytes of its first four and those of the others.
inline void zmm_positions(const uint8_t* masks, __m512i& first, __m512i& second) {
  first = positions_of_eight(masks);
  second = positions_of_eight(masks + ria::kStripRows);
  transpose_lanes(first, second);
}

}  // namespace
