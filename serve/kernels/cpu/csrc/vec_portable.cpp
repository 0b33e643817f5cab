// Any machine: plain loops over 16 lanes, which the compiler may vectorise.
#include <type_traits>

#include "gemm_rows.h"
#include "scalar.h"

namespace {

template <class V, Dtype kType, int64_t kUnitGroups, bool kGroups = false>
struct PortableTraits {
  using Value = V;
  static constexpr bool kAnyActivations = has_scales(kType);
  struct Accumulators { float lane[kStripRows]; };
  struct Weights { float first[kStripRows], second[kStripRows]; };
  struct Positions { uint8_t first[kStripRows], second[kStripRows]; };
  using Activations = const float*;
  static constexpr int64_t kBlockTokens = 4;
  static constexpr int kUnpackedTokens = 0;
  static constexpr int64_t kTokensWithSums = 0;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr int64_t kVectors = kUnitGroups;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kGrouped = kGroups;
  static constexpr bool kSumsBlocks = false;
  static constexpr bool kExpands = kType == Dtype::int4;

  static Weights weights(const uint8_t* p) {
    std::conditional_t<kType == Dtype::int8, Int8, Value> values[2 * kStripRows];
    std::memcpy(values, p, sizeof values);
    Weights w;
    for (int r = 0; r < kStripRows; ++r) {
      w.first[r] = values[interleaved(kType) ? 2 * r : r].to_float();
      w.second[r] = values[interleaved(kType) ? 2 * r + 1 : r + kStripRows].to_float();
    }
    return w;
  }
  static uint16_t word(const uint8_t* block, int line, int place) {
    uint16_t word;
    std::memcpy(&word, block + line * kCacheLine + place * sizeof word, sizeof word);
    return word;
  }
  template <int kGroup>
  static Weights int4_weights(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    Weights w;
    for (int r = 0; r < kStripRows; ++r) {
      w.first[r] = int4_value(word(block, at.value_line, 2 * r) >> at.value_bit);
      w.second[r] = int4_value(word(block, at.value_line, 2 * r + 1) >> at.value_bit);
    }
    return w;
  }
  static float int4_value(int bits) { return static_cast<float>(((bits & 15) ^ 8) - 8); }  // bit 3 is the sign
  template <int kGroup>
  static Positions int4_positions(const uint8_t* block) {
    constexpr Int4Bits at = Int4Bits::of(kGroup, kVectors);
    Positions p;
    for (int r = 0; r < kStripRows; ++r) {
      p.first[r] = word(block, at.position_line, 2 * r) >> at.position_bit & 3;
      p.second[r] = word(block, at.position_line, 2 * r + 1) >> at.position_bit & 3;
    }
    return p;
  }
  static void expand(uint8_t* p, const Weights& w) { std::memcpy(p, &w, sizeof w); }
  static Weights load_expanded(const uint8_t* p) {
    Weights w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static void positions(const uint8_t* bits, Positions (&to)[1]) {
    for (int r = 0; r < kStripRows; ++r) {
      to[0].first[r] = bits[r / 2] >> (r % 2 * 4) & 3;
      to[0].second[r] = bits[r / 2] >> (r % 2 * 4 + 2) & 3;
    }
  }
  static void positions(const uint8_t* masks, Positions (&to)[4]) {
    for (int64_t r = 0; r < kStripRows; ++r) {
      const uint8_t* mask = masks + mask_offset(r);
      const uint64_t eight = kPositionTable.of(mask[0], mask[1]);
      for (int i = 0; i < 4; ++i) {
        to[i].first[r] = static_cast<uint8_t>(eight >> (16 * i + 8));
        to[i].second[r] = static_cast<uint8_t>(eight >> (16 * i));
      }
    }
  }
  static Positions load_positions(const uint8_t* p) {
    Positions positions;
    std::memcpy(&positions, p, sizeof positions);
    return positions;
  }
  static void store_positions(uint8_t* p, const Positions& positions) { std::memcpy(p, &positions, sizeof positions); }
  static Activations broadcast(const uint8_t* p) { return reinterpret_cast<const float*>(p); }
  static Accumulators load(const float* p) {
    Accumulators sums;
    std::memcpy(&sums, p, sizeof sums);
    return sums;
  }
  static void store(float* p, const Accumulators& sums) { std::memcpy(p, &sums, sizeof sums); }
  static Accumulators multiply_add(Accumulators sums, const Weights& w, const Positions& p, Activations x) {
    for (int r = 0; r < kStripRows; ++r) sums.lane[r] += w.first[r] * x[p.first[r]] + w.second[r] * x[p.second[r]];
    return sums;
  }
  static Accumulators load_scales(const uint8_t* p, Dtype dtype) {
    switch (dtype) {
      case Dtype::bfloat16: return scales_of<Bfloat16>(p);
      case Dtype::float16: return scales_of<Float16>(p);
      default: return scales_of<Float32>(p);
    }
  }
  template <class Scale>
  static Accumulators scales_of(const uint8_t* p) {
    Scale scales[kStripRows];
    std::memcpy(scales, p, sizeof scales);
    Accumulators wide;
    for (int r = 0; r < kStripRows; ++r) wide.lane[r] = scales[r].to_float();
    return wide;
  }
  static Accumulators scaled(const Accumulators& sums, const Accumulators& scales, Accumulators initial) {
    for (int r = 0; r < kStripRows; ++r) initial.lane[r] += sums.lane[r] * scales.lane[r];
    return initial;
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
};

}  // namespace

const ria::InstructionSet ria::kPortable = {"portable", products_of_any<RowKernels, PortableTraits, 1>(),
                                            &ria::kPortableOf16, &ria::kPortableInt8};
const ria::Products ria::kPortableOf16 = products_of_any<RowKernels, PortableTraits, 4>();
