// AVX-512 F, BW, VL, DQ: fp32 arithmetic, 16 rows in one vector.
#include <immintrin.h>

#include <type_traits>

#include "avx512_floats.h"
#include "gemm_tokens.h"
#include "scalar.h"
#include "ymm_masks.h"

namespace {

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

struct Avx512TokenTraits {
  using Vector = __m512;
  static constexpr int64_t kTokens = 16;
  static constexpr int kAccumulators = 24;

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector multiply_add(Vector weight, Vector x, Vector sum) { return _mm512_fmadd_ps(weight, x, sum); }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(static_cast<int>(stride)));
    for (int t = 0; t < kTokens; ++t) store(to + t * to_stride, _mm512_i32gather_ps(rows, from + t, sizeof(float)));
  }
};

template <class V, Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct Avx512Traits {
  using Value = V;
  static constexpr bool kAnyActivations = has_scales(kType);
  using Accumulators = __m512;
  struct Weights { __m512 first, second; };
  using Positions = __m512i;   // 32 bits per row: the first position from kFirstPosition on, the other one likewise
  using Activations = __m512;  // four channels, four times; or a unit's
  static constexpr int64_t kBlockTokens = 10;
  static constexpr int kUnpackedTokens = 4;
  static constexpr int64_t kTokensWithSums = 5;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr int64_t kVectors = kUnitGroups;
  static constexpr int64_t kMinTokens = 41;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kGrouped = kGroups;
  static constexpr bool kSumsBlocks = false;
  static constexpr bool kExpands = kType == Dtype::int4;
  static constexpr int kFirstPosition = kVectors == 4 ? 8 : 0;
  static constexpr int kSecondPosition = kVectors == 4 ? 0 : kType == Dtype::int4 ? 16 : 2;
  using TokenVecTraits = Avx512TokenTraits;

  static Weights weights(const uint8_t* p) {
    if constexpr (kType == Dtype::bfloat16) {
      const __m512i pairs = _mm512_loadu_si512(p);
      return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    } else if constexpr (kType == Dtype::int8) {
      const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24)),
              _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 24))};
    } else if constexpr (kType == Dtype::float16) {
      const __m256i* halves = reinterpret_cast<const __m256i*>(p);
      return {_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))};
    } else {
      return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 64)};
    }
  }
  static void positions(const uint8_t* bits, Positions (&to)[1]) {
    const __m512i both =
        _mm512_mask_broadcastd_epi32(_mm512_broadcastd_epi32(_mm_loadu_si32(bits)), 0xff00, _mm_loadu_si32(bits + 4));
    to[0] = _mm512_srlv_epi32(both, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  }
  static void positions(const uint8_t* masks, Positions (&to)[4]) {
    const YmmPositions found = ymm_positions(masks);
    to[0] = _mm512_inserti64x4(_mm512_castsi256_si512(found.first_low), found.first_high, 1);
    to[1] = _mm512_srli_epi32(to[0], 16);
    to[2] = _mm512_inserti64x4(_mm512_castsi256_si512(found.second_low), found.second_high, 1);
    to[3] = _mm512_srli_epi32(to[2], 16);
  }
  template <int kGroup>
  static Weights int4_weights(const uint8_t* block) {
    // A table of the 16 values; an index's other bits do not matter.
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    const __m512i words = _mm512_loadu_si512(block + at.value_line * kCacheLine);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(words, at.value_bit), values),
            _mm512_permutexvar_ps(_mm512_srli_epi32(words, at.value_bit + 16), values)};
  }
  template <int kGroup>
  static Positions int4_positions(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    return _mm512_srli_epi32(_mm512_loadu_si512(block + at.position_line * kCacheLine), at.position_bit);
  }
  static void expand(uint8_t* p, const Weights& w) {
    _mm512_store_ps(p, w.first);
    _mm512_store_ps(p + 64, w.second);
  }
  static Weights load_expanded(const uint8_t* p) { return {_mm512_load_ps(p), _mm512_load_ps(p + 64)}; }
  static Positions load_positions(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store_positions(uint8_t* p, Positions positions) { _mm512_store_si512(p, positions); }
  static Activations broadcast(const uint8_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    return kVectors == 1 ? _mm512_broadcast_f32x4(_mm_loadu_ps(f)) : _mm512_loadu_ps(f);
  }
  template <int kBit>
  static __m512 pick(Activations x, Positions positions) {
    const __m512i p = _mm512_srli_epi32(positions, kBit);
    return kVectors == 1 ? _mm512_permutevar_ps(x, p) : _mm512_permutexvar_ps(p, x);
  }
  static Accumulators load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Accumulators sums) { _mm512_store_ps(p, sums); }
  static Accumulators multiply_add(Accumulators sums, const Weights& w, Positions p, Activations x) {
    sums = _mm512_fmadd_ps(w.first, pick<kFirstPosition>(x, p), sums);
    return _mm512_fmadd_ps(w.second, pick<kSecondPosition>(x, p), sums);
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) { return load_16_floats(p, dtype); }
  static Accumulators scaled(Accumulators sums, Accumulators scales, Accumulators initial) {
    return _mm512_fmadd_ps(sums, scales, initial);
  }
  template <class Channel>
  static void store_channels(uint8_t* unit, int64_t group, Channel a, Channel b, Channel c, Channel d) {
    const float four[4] = {a.to_float(), b.to_float(), c.to_float(), d.to_float()};
    std::memcpy(unit + group * kActivationBytes, four, sizeof four);
  }
  template <class Result>
  static void store_from_float(Result* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kStripRows) {
      const __m512 sums = _mm512_load_ps(from + i);
      const __mmask16 lanes = first_lanes(count - i < kStripRows ? count - i : kStripRows);
      if constexpr (std::is_same_v<Result, Float32>) {
        _mm512_mask_storeu_ps(to + i, lanes, sums);
      } else if constexpr (std::is_same_v<Result, Float16>) {
        _mm256_mask_storeu_epi16(to + i, lanes, _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
      } else {
        const __m512i bits = _mm512_castps_si512(sums);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
        _mm256_mask_storeu_epi16(to + i, lanes,
                                 _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
      }
    }
  }

  static void unpack_weights(const Weights& w, float* first, float* second) {
    _mm512_storeu_ps(first, w.first);
    _mm512_storeu_ps(second, w.second);
  }
  static void unpack_offsets(Positions p, const uint32_t* offsets, uint32_t* first, uint32_t* second) {
    const Activations x = broadcast(reinterpret_cast<const uint8_t*>(offsets));
    _mm512_storeu_ps(first, pick<kFirstPosition>(x, p));
    _mm512_storeu_ps(second, pick<kSecondPosition>(x, p));
  }
};

}  // namespace

const ria::InstructionSet ria::kAvx512 = {"avx512", products_of_any<RowAndTokenKernels, Avx512Traits, 1>(),
                                          &ria::kAvx512Of16, &ria::kAvx2Int8};
const ria::Products ria::kAvx512Of16 = products_of_any<RowAndTokenKernels, Avx512Traits, 4>();
