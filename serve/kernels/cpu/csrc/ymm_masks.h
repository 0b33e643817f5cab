// The positions of what an 8:16 matrix keeps, with AVX2: joined entries of a table.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace {

struct YmmPositions {
  __m256i first_low, first_high, second_low, second_high;
};  // of a row's first four, of its others

// Of two rows.
inline __m128i positions_of_two(const uint8_t* masks) {
  const auto both = [](const uint64_t* table, int64_t first, int64_t second) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + first));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), reinterpret_cast<const __m64*>(table + second)));
  };
  return _mm_or_si128(both(ria::kPositionTable.low, masks[0], masks[2]),
                      both(ria::kPositionTable.high, masks[1], masks[3]));
}
inline __m256i positions_of_four(const uint8_t* masks) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(positions_of_two(masks)), positions_of_two(masks + 4), 1);
}
// Of the 16 rows of a strip: 32 bits for each, four bytes. `low`: rows 0 to 7.
inline YmmPositions ymm_positions(const uint8_t* masks) {
  YmmPositions to;
  const auto transpose = [](__m256i even, __m256i odd, __m256i& first, __m256i& second) {
    first = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    second = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  };
  transpose(positions_of_four(masks), positions_of_four(masks + 16), to.first_low, to.second_low);
  transpose(positions_of_four(masks + 8), positions_of_four(masks + 24), to.first_high, to.second_high);
  return to;
}

}  // namespace
