// Any machine: plain loops over 16 lanes, which the compiler may vectorise.
#include <type_traits>

#include "gemm_rows.h"
#include "scalar.h"

namespace {

template <class V, Dtype kType>
struct PortableTraits {
  using Value = V;
  struct Accumulators { float lane[kStripRows]; };
  struct Weights { float first[kStripRows], second[kStripRows]; };
  struct Positions { uint8_t first[kStripRows], second[kStripRows]; };
  using Activations = const float*;
  static constexpr int64_t kBlockTokens = 4;
  static constexpr int64_t kActivationBytes = 16;
  static constexpr Dtype kDtype = kType;
  static constexpr bool kExpands = false;

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
  static Positions positions(uint64_t bits) {
    Positions p;
    for (int r = 0; r < kStripRows; ++r) {
      p.first[r] = bits >> (4 * r) & 3;
      p.second[r] = bits >> (4 * r + 2) & 3;
    }
    return p;
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
  static void store_channels(uint8_t* panel, Value a, Value b, Value c, Value d) {
    const float four[4] = {a.to_float(), b.to_float(), c.to_float(), d.to_float()};
    std::memcpy(panel, four, sizeof four);
  }
  static void load_as_float(const Value* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i].to_float();
  }
  static void store_from_float(Value* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = Value::from_float(from[i]);
  }
};

}  // namespace

const ria::InstructionSet ria::kPortable = {"portable",
                                            {{row_kernel<PortableTraits<Bfloat16, Dtype::bfloat16>>()},
                                             {row_kernel<PortableTraits<Float16, Dtype::float16>>()},
                                             {row_kernel<PortableTraits<Float32, Dtype::float32>>()},
                                             {row_kernel<PortableTraits<Bfloat16, Dtype::int8>>()}}};
