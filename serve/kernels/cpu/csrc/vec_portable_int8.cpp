// Any machine: int8 activations in plain loops over 16 rows.
#include "gemm_int8.h"

namespace {

struct PortableInt8Traits {
  struct Weights { int8_t value[kStripRows][4]; };
  struct Positions { uint8_t channel[kStripRows][4]; };  // within the unit
  using Activations = const uint8_t*;
  struct Accumulators { int32_t row[kStripRows]; };
  static constexpr int64_t kBlockTokens = 4;
  static constexpr int64_t kStreamTokens = 4, kBlockSumTokens = 0;
  static constexpr int64_t kVectors = 1;
  static constexpr int kOffset = 0;

  static Weights weights8(const uint8_t* p) { return load_weights(p); }
  struct Multipliers { uint8_t row[kStripRows]; };
  static Multipliers multipliers(const uint8_t* p) {
    Multipliers multipliers;
    for (int r = 0; r < kStripRows; ++r) multipliers.row[r] = static_cast<uint8_t>(p[r % 8] >> (r < 8 ? 0 : 4) & 15);
    return multipliers;
  }
  static Weights weights4(const uint8_t* p, const Multipliers& multipliers) {
    Weights w;
    for (int r = 0; r < kStripRows; ++r)
      for (int i = 0; i < 4; ++i)
        w.value[r][i] = static_cast<int8_t>(((p[r % 8 * 4 + i] >> (r < 8 ? 4 : 0) & 15) - 8) * multipliers.row[r]);
    return w;
  }
  static void store_weights(uint8_t* p, const Weights& w) { std::memcpy(p, &w, sizeof w); }
  static Weights load_weights(const uint8_t* p) {
    Weights w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static void positions(const uint8_t* p, Positions (&to)[1]) {
    for (int r = 0; r < kStripRows; ++r)
      for (int i = 0; i < 4; ++i)
        to[0].channel[r][i] = static_cast<uint8_t>((p[r % 4 * 4 + i] >> (r / 4 * 2) & 3) | (i < 2 ? 0 : 4));
  }
  static void store_positions(uint8_t* p, const Positions& positions) { std::memcpy(p, &positions, sizeof positions); }
  static Positions load_positions(const uint8_t* p) {
    Positions positions;
    std::memcpy(&positions, p, sizeof positions);
    return positions;
  }
  static Activations broadcast(const uint8_t* p) { return p; }
  using Dense = const int8_t*;
  using DenseSums = int32_t;
  static constexpr int64_t kDenseBytes = 64, kDenseRows = 2;
  static Dense load_dense(const void* p) { return static_cast<const int8_t*>(p); }
  static Dense load_digits(const void* p) { return load_dense(p); }
  static DenseSums dense_zero() { return 0; }
  static DenseSums dense_dot(DenseSums sums, Dense x, Dense w) {
    for (int64_t i = 0; i < kDenseBytes; ++i) sums += x[i] * w[i];
    return sums;
  }
  static int32_t total(DenseSums sums) { return sums; }
  static Accumulators load_sums(const int32_t* p) {
    Accumulators sums;
    std::memcpy(&sums, p, sizeof sums);
    return sums;
  }
  static void store_sums(int32_t* p, const Accumulators& sums) { std::memcpy(p, &sums, sizeof sums); }
  static Accumulators multiply_add(Accumulators sums, const Weights& w, const Positions& p, Activations x) {
    for (int r = 0; r < kStripRows; ++r)
      for (int i = 0; i < 4; ++i) sums.row[r] += w.value[r][i] * static_cast<int8_t>(x[p.channel[r][i]]);
    return sums;
  }
  static void halves_to_float(const uint8_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from + 2 * i);
  }
  static void floats_to_half(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = Float16::from_float(from[i]).bits;
  }
};

// For 8:16 matrices.
struct PortableOf16Traits : PortableInt8Traits {
  static constexpr int64_t kVectors = 2;

  static void positions(const uint8_t* masks, Positions (&to)[2]) {
    for (int64_t r = 0; r < kStripRows; ++r) {
      const uint8_t* mask = masks + mask_offset(r);
      const uint64_t eight = kPositionTable.of(mask[0], mask[1]);
      for (int i = 0; i < 8; ++i) to[i / 4].channel[r][i % 4] = static_cast<uint8_t>(eight >> 8 * i);
    }
  }
};

}  // namespace

const ria::Int8Kernels ria::kPortableInt8 = int8_kernels<PortableInt8Traits>(ria::kPortableInt8Of16);
const ria::Int8Products ria::kPortableInt8Of16 = int8_products<PortableOf16Traits>();
