// What AVX-512 does with int8 activations and 8:16 matrices, with VBMI2 besides VNNI.
#pragma once
#include "avx512_vnni.h"
#include "zmm_masks.h"

namespace {

struct Avx512Of16Traits : Avx512VnniTraits {
  static constexpr int64_t kBlockTokens = 9;  // their activations stay in registers for a unit's second vector
  static constexpr int64_t kVectors = 2;

  static void positions(const uint8_t* masks, Positions (&to)[2]) { zmm_positions(masks, to[0], to[1]); }
  static Activations broadcast(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
