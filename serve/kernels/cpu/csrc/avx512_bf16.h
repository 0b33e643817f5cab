// What AVX-512 with BF16 and VBMI does with bfloat16, int8 and int4 weights: the traits of gemm_rows.h. The kernels for
// AMX (gemm_amx.h) unpack weights with them, too.
#pragma once
#include <immintrin.h>

#include "avx512_floats.h"
#include "gemm_rows.h"
#include "scalar.h"
#include "zmm_masks.h"

namespace {

// For bfloat16 weights, and for int8 and int4 weights, which become bfloat16: it holds every int8 exactly.
template <Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct Avx512Bf16Traits {
  using Value = Bfloat16;
  static constexpr bool kAnyActivations = false;
  using Accumulators = __m512;
  using Weights = __m512i;      // 16 pairs
  using Positions = __m512i;    // word index of each weight's activation; only the low two bits, or four, are defined
  using Activations = __m512i;  // those of a unit, again and again, so that an index's other bits do not matter
  static constexpr int kUnpackedTokens = 4;
  static constexpr int64_t kTokensWithSums = 6;
  // With a wide unit, their activations stay in registers from one of its vectors to the next.
  static constexpr int64_t kBlockTokens = kUnitGroups == 4 ? 9 : 12;
  static constexpr int64_t kActivationBytes = 8;
  static constexpr int64_t kVectors = kUnitGroups;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kGrouped = kGroups;
  static constexpr bool kSumsBlocks = false;
  static constexpr bool kExpands = has_scales(kType);

  static Weights weights(const uint8_t* p) {
    if constexpr (kType == Dtype::bfloat16) return _mm512_loadu_si512(p);
    const __m128i* bytes = reinterpret_cast<const __m128i*>(p);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
  // bfloat16 of -8 to 7, each four times: the lowest two bits of an index do not matter.
  static __m512i int4_table(bool negative) {
    const __m512i four = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i number = negative ? _mm512_sub_epi64(four, _mm512_set1_epi64(8)) : four;
    const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(number)), 16);
    return _mm512_shuffle_epi8(
        bits, _mm512_set_epi64(0x0908090809080908, 0x0100010001000100, 0x0908090809080908, 0x0100010001000100,
                               0x0908090809080908, 0x0100010001000100, 0x0908090809080908, 0x0100010001000100));
  }
  template <int kGroup>
  static Weights int4_weights(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    const __m512i index = shifted<at.value_bit - 2>(block + at.value_line * kCacheLine);
    return _mm512_permutex2var_epi16(int4_table(false), index, int4_table(true));
  }
  template <int kGroup>
  static Positions int4_positions(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    return shifted<at.position_bit>(block + at.position_line * kCacheLine);
  }
  template <int kBits>
  static __m512i shifted(const uint8_t* line) {
    const __m512i words = _mm512_loadu_si512(line);
    if constexpr (kBits < 0)
      return _mm512_slli_epi16(words, -kBits);
    else
      return _mm512_srli_epi16(words, kBits);
  }
  static void expand(uint8_t* p, Weights w) { _mm512_store_si512(p, w); }
  static Weights load_expanded(const uint8_t* p) { return _mm512_load_si512(p); }
  static void positions(const uint8_t* bits, Positions (&to)[1]) {
    // Each byte of the result is eight bits of `bits`, starting at the bit that `offsets` names. The two words of row r
    // start at bits 4r and 4r + 2. The upper byte of each word is not used.
    const __m512i offsets =
        _mm512_setr_epi64(0x0006000400020000, 0x000e000c000a0008, 0x0016001400120010, 0x001e001c001a0018,
                          0x0026002400220020, 0x002e002c002a0028, 0x0036003400320030, 0x003e003c003a0038);
    to[0] = _mm512_multishift_epi64_epi8(offsets, _mm512_set1_epi64(static_cast<int64_t>(load_u64(bits))));
  }
  static void positions(const uint8_t* masks, Positions (&to)[4]) {
    __m512i first, second;
    zmm_positions(masks, first, second);
    // The bytes 1 and 0 of each row, and 3 and 2, as the lower ones of two words.
    const __m512i low = _mm512_set4_epi32(0x000c000d, 0x00080009, 0x00040005, 0x00000001);
    const __m512i high = _mm512_set4_epi32(0x000e000f, 0x000a000b, 0x00060007, 0x00020003);
    to[0] = _mm512_shuffle_epi8(first, low), to[1] = _mm512_shuffle_epi8(first, high);
    to[2] = _mm512_shuffle_epi8(second, low), to[3] = _mm512_shuffle_epi8(second, high);
  }
  static Positions load_positions(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store_positions(uint8_t* p, Positions positions) { _mm512_store_si512(p, positions); }
  static Activations broadcast(const uint8_t* p) {
    if constexpr (kVectors == 1)
      return _mm512_set1_epi64(static_cast<int64_t>(load_u64(p)));
    else
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Accumulators load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Accumulators sums) { _mm512_store_ps(p, sums); }
  static Accumulators multiply_add(Accumulators sums, Weights w, Positions p, Activations x) {
    const __m512i picked = _mm512_permutexvar_epi16(p, x);
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(picked));
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) { return load_16_floats(p, dtype); }
  static Accumulators scaled(Accumulators sums, Accumulators scales, Accumulators initial) {
    return _mm512_fmadd_ps(sums, scales, initial);
  }
  static void store_channels(uint8_t* unit, int64_t group, Value a, Value b, Value c, Value d) {
    const uint64_t four = a.bits | static_cast<uint64_t>(b.bits) << 16 | static_cast<uint64_t>(c.bits) << 32 |
                          static_cast<uint64_t>(d.bits) << 48;
    std::memcpy(unit + group * kActivationBytes, &four, sizeof four);
  }
  static void store_from_float(Value* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kStripRows) {
      const int64_t lanes = count - i < kStripRows ? count - i : kStripRows;
      _mm256_mask_storeu_epi16(to + i, static_cast<__mmask16>((1u << lanes) - 1),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_load_ps(from + i))));
    }
  }
};

}  // namespace
