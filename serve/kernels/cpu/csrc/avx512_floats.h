// Floats of any dtype, for kernels that use AVX-512.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace {

// 16 values of bfloat16, float16 or float32, anywhere.
inline __m512 load_16_floats(const uint8_t* p, ria::Dtype dtype) {
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  switch (dtype) {
    case ria::Dtype::bfloat16:
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(words)), 16));
    case ria::Dtype::float16: return _mm512_cvtph_ps(_mm256_loadu_si256(words));
    default: return _mm512_loadu_ps(p);
  }
}

}  // namespace
