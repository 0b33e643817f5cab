// AVX2 + FMA + F16C: fp32 arithmetic, 16 rows in two vectors.
#include <immintrin.h>

#include "gemm_tokens.h"
#include "scalar.h"
#include "ymm_masks.h"

namespace {

inline __m256i load_bits(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256 halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Eight pairs of int8, each pair in the low half of 32 bits; and one int8 of each pair, the one that `shift` moves to
// the top byte.
inline __m256i pairs_of_bytes(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 byte_of(__m256i pairs, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, shift), 24));
}

// Eight int4, in 32 bits each, the top four of which are those that `shift` moves there.
inline __m256 nibble_of(__m256i words, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, shift), 28));
}

inline void store_bits(uint32_t* p, __m256 bits) { _mm256_storeu_ps(reinterpret_cast<float*>(p), bits); }

struct Avx2TokenTraits {
  using Vector = __m256;
  static constexpr int64_t kTokens = 8;
  static constexpr int kAccumulators = 12;

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector multiply_add(Vector weight, Vector x, Vector sum) { return _mm256_fmadd_ps(weight, x, sum); }
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    __m256 rows[8], pairs[8];
    for (int i = 0; i < 4; ++i) {  // rows i and i + 4 of the left half, then of the right half
      rows[i] = both_halves(from + i * stride, from + (i + 4) * stride);
      rows[i + 4] = both_halves(from + i * stride + 4, from + (i + 4) * stride + 4);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        pairs[i + 2 * j] = _mm256_unpacklo_ps(rows[i + 2 * j], rows[i + 2 * j + 1]);
        pairs[i + 2 * j + 1] = _mm256_unpackhi_ps(rows[i + 2 * j], rows[i + 2 * j + 1]);
      }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        _mm256_storeu_ps(to + (i + 2 * j) * to_stride, _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44));
        _mm256_storeu_ps(to + (i + 2 * j + 1) * to_stride, _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee));
      }
  }
  static __m256 both_halves(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
};

template <class V, Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct Avx2Traits {
  using Value = V;
  static constexpr bool kAnyActivations = has_scales(kType);
  struct Accumulators { __m256 low, high; };
  struct Weights { __m256 first_low, first_high, second_low, second_high; };
  // 32 bits per row: the first position from kFirstPosition on, the second from kSecondPosition.
  struct Positions { __m256i low, high; };
  struct Sixteen { __m256 low, high; };
  using Activations = std::conditional_t<kUnitGroups == 1, __m256, Sixteen>;  // four channels, twice; or a unit's
  static constexpr int64_t kBlockTokens = 3;
  static constexpr int kUnpackedTokens = 4;
  static constexpr int64_t kTokensWithSums = 1;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr int64_t kVectors = kUnitGroups;
  // Of 8:16 matrices, vectors over rows pick slowly.
  static constexpr int64_t kMinTokens = kVectors == 1 ? 21 : 6;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kGrouped = kGroups;
  static constexpr bool kSumsBlocks = false;
  static constexpr bool kExpands = kType == Dtype::int4;
  static constexpr int kFirstPosition = kVectors == 4 ? 8 : 0;
  static constexpr int kSecondPosition = kVectors == 4 ? 0 : kType == Dtype::int4 ? 16 : 2;
  using TokenVecTraits = Avx2TokenTraits;

  static Weights weights(const uint8_t* p) {
    if constexpr (kType == Dtype::bfloat16) {
      const __m256i low = load_bits(p), high = load_bits(p + 32);
      const __m256i second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
      return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
              _mm256_castsi256_ps(_mm256_and_si256(low, second)), _mm256_castsi256_ps(_mm256_and_si256(high, second))};
    } else if constexpr (kType == Dtype::int8) {
      const __m256i low = pairs_of_bytes(p), high = pairs_of_bytes(p + 16);
      return {byte_of(low, 24), byte_of(high, 24), byte_of(low, 16), byte_of(high, 16)};
    } else if constexpr (kType == Dtype::float16) {
      return {halves(p), halves(p + 16), halves(p + 32), halves(p + 48)};
    } else {
      const float* f = reinterpret_cast<const float*>(p);
      return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8), _mm256_loadu_ps(f + 16), _mm256_loadu_ps(f + 24)};
    }
  }
  static void positions(const uint8_t* bits, Positions (&to)[1]) {
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const auto eight_rows = [&](const uint8_t* p) {
      return _mm256_srlv_epi32(_mm256_broadcastd_epi32(_mm_loadu_si32(p)), shift);
    };
    to[0] = {eight_rows(bits), eight_rows(bits + 4)};
  }
  static void positions(const uint8_t* masks, Positions (&to)[4]) {
    const YmmPositions found = ymm_positions(masks);
    to[0] = {found.first_low, found.first_high};
    to[1] = {_mm256_srli_epi32(found.first_low, 16), _mm256_srli_epi32(found.first_high, 16)};
    to[2] = {found.second_low, found.second_high};
    to[3] = {_mm256_srli_epi32(found.second_low, 16), _mm256_srli_epi32(found.second_high, 16)};
  }
  template <int kGroup>
  static Weights int4_weights(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    const uint8_t* line = block + at.value_line * kCacheLine;
    const __m256i low = load_bits(line), high = load_bits(line + 32);
    return {nibble_of(low, 28 - at.value_bit), nibble_of(high, 28 - at.value_bit), nibble_of(low, 12 - at.value_bit),
            nibble_of(high, 12 - at.value_bit)};
  }
  template <int kGroup>
  static Positions int4_positions(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    const uint8_t* line = block + at.position_line * kCacheLine;
    return {_mm256_srli_epi32(load_bits(line), at.position_bit),
            _mm256_srli_epi32(load_bits(line + 32), at.position_bit)};
  }
  static void expand(uint8_t* p, const Weights& w) {
    float* to = reinterpret_cast<float*>(p);
    unpack_weights(w, to, to + kStripRows);
  }
  static Weights load_expanded(const uint8_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm256_load_ps(f), _mm256_load_ps(f + 8), _mm256_load_ps(f + 16), _mm256_load_ps(f + 24)};
  }
  static Positions load_positions(const uint8_t* p) { return {load_bits(p), load_bits(p + 32)}; }
  static void store_positions(uint8_t* p, const Positions& positions) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), positions.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), positions.high);
  }
  static Activations broadcast(const uint8_t* p) {
    const float* f = reinterpret_cast<const float*>(p);
    if constexpr (kVectors == 1)
      return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(f));
    else
      return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
  }
  static Accumulators load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, const Accumulators& sums) {
    _mm256_storeu_ps(p, sums.low);
    _mm256_storeu_ps(p + 8, sums.high);
  }
  template <int kBit>
  static __m256 pick(const Activations& x, __m256i positions) {
    const __m256i p = _mm256_srli_epi32(positions, kBit);
    if constexpr (kVectors == 1)
      return _mm256_permutevar_ps(x, p);
    else  // bit 3 of a position says which half
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.low, p), _mm256_permutevar8x32_ps(x.high, p),
                              _mm256_castsi256_ps(_mm256_slli_epi32(p, 28)));
  }
  static Accumulators multiply_add(const Accumulators& sums, const Weights& w, const Positions& p,
                                   const Activations& x) {
    const __m256 low = _mm256_fmadd_ps(w.first_low, pick<kFirstPosition>(x, p.low), sums.low);
    const __m256 high = _mm256_fmadd_ps(w.first_high, pick<kFirstPosition>(x, p.high), sums.high);
    return {_mm256_fmadd_ps(w.second_low, pick<kSecondPosition>(x, p.low), low),
            _mm256_fmadd_ps(w.second_high, pick<kSecondPosition>(x, p.high), high)};
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) {
    const __m128i* words = reinterpret_cast<const __m128i*>(p);
    switch (dtype) {
      case Dtype::bfloat16: return {wide(_mm_loadu_si128(words)), wide(_mm_loadu_si128(words + 1))};
      case Dtype::float16: return {halves(p), halves(p + 16)};
      default: return load(reinterpret_cast<const float*>(p));
    }
  }
  static __m256 wide(__m128i bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16), 16));
  }
  static Accumulators scaled(const Accumulators& sums, const Accumulators& scales, const Accumulators& initial) {
    return {_mm256_fmadd_ps(sums.low, scales.low, initial.low), _mm256_fmadd_ps(sums.high, scales.high, initial.high)};
  }
  template <class Channel>
  static void store_channels(uint8_t* unit, int64_t group, Channel a, Channel b, Channel c, Channel d) {
    const float four[4] = {a.to_float(), b.to_float(), c.to_float(), d.to_float()};
    std::memcpy(unit + group * kActivationBytes, four, sizeof four);
  }
  template <class Result>
  static void store_from_float(Result* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = Result::from_float(from[i]);
  }

  static void unpack_weights(const Weights& w, float* first, float* second) {
    _mm256_storeu_ps(first, w.first_low);
    _mm256_storeu_ps(first + 8, w.first_high);
    _mm256_storeu_ps(second, w.second_low);
    _mm256_storeu_ps(second + 8, w.second_high);
  }
  static void unpack_offsets(const Positions& p, const uint32_t* offsets, uint32_t* first, uint32_t* second) {
    const Activations x = broadcast(reinterpret_cast<const uint8_t*>(offsets));
    store_bits(first, pick<kFirstPosition>(x, p.low));
    store_bits(first + 8, pick<kFirstPosition>(x, p.high));
    store_bits(second, pick<kSecondPosition>(x, p.low));
    store_bits(second + 8, pick<kSecondPosition>(x, p.high));
  }
};

}  // namespace

const ria::InstructionSet ria::kAvx2 = {"avx2", products_of_any<RowAndTokenKernels, Avx2Traits, 1>(), &ria::kAvx2Of16,
                                        &ria::kAvx2Int8};
const ria::Products ria::kAvx2Of16 = products_of_any<RowAndTokenKernels, Avx2Traits, 4>();
