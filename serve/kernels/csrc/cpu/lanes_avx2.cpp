// AVX2 + FMA + F16C: fp32 arithmetic, 16 rows in two vectors.
#include <immintrin.h>

#include "product.h"
#include "scalar.h"

namespace {

inline __m256i load_bits(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Eight pairs of int8, each pair in the low half of 32 bits; and one int8 of each, which `shift` moves to the top.
inline __m256i pairs_of_bytes(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 byte_of(__m256i pairs, int shift) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, shift), 24));
}

template <class V, Dtype kType>
struct Avx2Lanes {
  using Value = V;
  struct Sums { __m256 low, high; };
  struct Weights { __m256 first_low, first_high, second_low, second_high; };
  struct Positions { __m256i low, high; };  // per row in 32 bits: first position in the low two, second in the next
  using Activations = __m256;               // the four channels, twice
  static constexpr int64_t kBlockTokens = 3;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kExpands = false;

  static Weights weights(const uint8_t* p) {
    if constexpr (kType == Dtype::bfloat16) {
      const __m256i low = load_bits(p), high = load_bits(p + 32), second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
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
  static Positions positions(uint64_t bits) {
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return {_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shift),
            _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits >> 32)), shift)};
  }
  static Positions load_positions(const uint8_t* p) { return {load_bits(p), load_bits(p + 32)}; }
  static void store_positions(uint8_t* p, const Positions& positions) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), positions.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), positions.high);
  }
  static Activations broadcast(const uint8_t* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
  static Sums load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, const Sums& sums) {
    _mm256_storeu_ps(p, sums.low);
    _mm256_storeu_ps(p + 8, sums.high);
  }
  static __m256 pick(__m256 x, __m256i positions) { return _mm256_permutevar_ps(x, positions); }
  static Sums multiply_add(const Sums& sums, const Weights& w, const Positions& p, Activations x) {
    const __m256 low = _mm256_fmadd_ps(w.first_low, pick(x, p.low), sums.low);
    const __m256 high = _mm256_fmadd_ps(w.first_high, pick(x, p.high), sums.high);
    return {_mm256_fmadd_ps(w.second_low, pick(x, _mm256_srli_epi32(p.low, 2)), low),
            _mm256_fmadd_ps(w.second_high, pick(x, _mm256_srli_epi32(p.high, 2)), high)};
  }
  static void put(uint8_t* panel, Value a, Value b, Value c, Value d) {
    const float four[4] = {a.to_float(), b.to_float(), c.to_float(), d.to_float()};
    std::memcpy(panel, four, sizeof four);
  }
  static void read(const Value* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i].to_float();
  }
  static void write(Value* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = Value::from_float(from[i]);
  }
};

}  // namespace

const ria::InstructionSet ria::kAvx2 = {
    "avx2",
    {kernel_of<Avx2Lanes<Bfloat16, Dtype::bfloat16>>(), kernel_of<Avx2Lanes<Float16, Dtype::float16>>(),
     kernel_of<Avx2Lanes<Float32, Dtype::float32>>(), kernel_of<Avx2Lanes<Bfloat16, Dtype::int8>>()}};
