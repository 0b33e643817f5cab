// The C++ beneath the operators, under sanitizers: one instruction set over shapes with partial tiles and blocks, in
// buffers of exactly the promised size, against double precision: products, with inputs rounded to int8 or not, and
// layers of experts. Then bitmasks without the pattern.
// Prints "ok" and the name of the instruction set, which RIA_VLLM_CPU_ISA chooses.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "scalar.h"

using namespace ria;

int64_t ria::threads() { return 2; }

void ria::parallel_for(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, i + 1, context);
}

static uint32_t state = 1;
static uint32_t random_bits() { return state = state * 1664525u + 1013904223u, state >> 8; }
static float random_value() { return static_cast<int>(random_bits() % 33) / 8.0f - 2.0f; }  // exact in every dtype

static const int kLegal[] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};

struct Aligned {
  explicit Aligned(int64_t bytes) : data(allocate(bytes), std::free) {}
  static uint8_t* allocate(int64_t bytes) {  // std::aligned_alloc takes only multiples of 64
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
    return static_cast<uint8_t*>(memory);
  }
  std::unique_ptr<uint8_t, void (*)(void*)> data;
};

// What a weight is made of, besides its shape. Inputs that are rounded take scales of groups with int4 only.
struct Kind {
  Dtype dtype;
  int64_t group_size = 0;
  Dtype scale_dtype = Dtype::float32;
  bool int8_activations = false;
  int64_t pattern = 4;
  Layout layout(int64_t rows, int64_t columns) const {
    if (int8_activations) return {rows, columns, dtype, 0, Dtype::float32, true, pattern};
    return {rows, columns, dtype, group_size, scale_dtype, false, pattern};
  }
};

// A 2:4 or 8:16 matrix [rows, columns], as numbers and packed. `gates`: as `pack` takes them; the layout has the packed
// rows.
struct Matrix {
  std::vector<double> dense;
  template <class Weight>
  static Matrix random(const Kind& kind, const Layout& layout, int64_t rows, int64_t gates, uint8_t* packed, Weight) {
    const int64_t columns = layout.columns, shared = kind.group_size ? kind.group_size : columns;
    const bool scaled = has_scales(layout.dtype);
    Matrix matrix{std::vector<double>(rows * columns)};
    std::vector<Weight> values(rows * columns / 2);
    std::vector<uint8_t> bitmask(rows * columns / 8);
    std::vector<float> scales(rows * columns / shared);
    for (Weight& value : values)
      value = Weight::from_float(scaled ? static_cast<float>(random_bits() % 16) - 8 : random_value());
    for (uint8_t& byte : bitmask) byte = kLegal[random_bits() % 6] | kLegal[random_bits() % 6] << 4;
    if (layout.pattern == 16)  // what one byte keeps, its neighbour does not
      for (size_t i = 0; i < bitmask.size(); i += 2)
        bitmask[i] = static_cast<uint8_t>(random_bits()), bitmask[i + 1] = static_cast<uint8_t>(~bitmask[i]);
    for (float& scale : scales) scale = scaled ? static_cast<float>(1 + random_bits() % 15) / 64.0f : 1.0f;
    for (int64_t i = 0, kept = 0; i < rows * columns; ++i)
      if (bitmask[i / 8] >> (i % 8) & 1)
        matrix.dense[i] = values[kept++].to_float() * static_cast<double>(scales[i / shared]);
    std::vector<uint8_t> pairs(values.size() / 2);  // of int4
    if (layout.dtype == Dtype::int4)
      for (size_t i = 0; i < pairs.size(); ++i)
        pairs[i] = static_cast<uint8_t>(static_cast<int>(values[2 * i].to_float()) + 8 +
                                        16 * (static_cast<int>(values[2 * i + 1].to_float()) + 8));
    std::vector<Bfloat16> short_scales;
    for (float scale : scales) short_scales.push_back(Bfloat16::from_float(scale));
    const void* stored = layout.dtype == Dtype::int4 ? static_cast<void*>(pairs.data()) : values.data();
    const void* stored_scales =
        kind.scale_dtype == Dtype::bfloat16 ? static_cast<void*>(short_scales.data()) : scales.data();
    pack(layout, stored, bitmask.data(), {scaled ? stored_scales : nullptr, kind.group_size, kind.scale_dtype}, packed,
         gates);
    return matrix;
  }
  double product(int64_t row, const double* x, int64_t columns) const {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += dense[row * columns + c] * x[c];
    return sum;
  }
};

// A token as the kernel rounds it to int8.
static std::vector<double> rounded(const std::vector<double>& x) {
  float largest = 0;
  for (double value : x) largest = std::fmax(largest, static_cast<float>(std::fabs(value)));
  std::vector<double> integers(x);
  if (largest == 0) return integers;
  const float factor = 127.0f / largest;
  for (double& value : integers)
    value = std::nearbyint(static_cast<float>(value) * factor) * static_cast<double>(largest / 127.0f);
  return integers;
}

template <class Value>
constexpr Dtype dtype_of() {
  if (std::is_same_v<Value, Float32>) return Dtype::float32;
  return std::is_same_v<Value, Float16> ? Dtype::float16 : Dtype::bfloat16;
}

template <class Weight, class Value = Weight>
static void check(const Kind& kind, int64_t tokens, int64_t rows, int64_t columns) {
  const Layout layout = kind.layout(rows, columns);
  std::vector<Value> x(tokens * columns), bias(rows), y(tokens * rows);
  std::vector<int32_t> permutation(columns);
  for (auto* list : {&x, &bias})
    for (Value& value : *list) value = Value::from_float(random_value());
  for (int64_t c = 0; c < columns; ++c) permutation[c] = static_cast<int32_t>(columns - 1 - c);
  Aligned packed(layout.bytes());
  const Matrix weight = Matrix::random(kind, layout, rows, 0, packed.data.get(), Weight{});

  GemmArgs args{};
  args.layout = layout;
  args.packed = packed.data.get();
  args.x = x.data();
  args.x_stride = columns;
  args.permutation = permutation.data();
  args.bias = bias.data();
  args.y = y.data();
  args.act_dtype = dtype_of<Value>();
  linear(args, tokens, instruction_set());

  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> given(columns);
    for (int64_t c = 0; c < columns; ++c) given[c] = x[t * columns + permutation[c]].to_float();
    if (kind.int8_activations) given = rounded(given);
    for (int64_t r = 0; r < rows; ++r) {
      const double sum = weight.product(r, given.data(), columns) + bias[r].to_float();
      const double error = std::fabs(y[t * rows + r].to_float() - sum);
      if (!(error <= std::fabs(sum) / 250 + 1e-3)) {
        std::printf("dtype %d group %ld int8 inputs %d tokens %ld %ld x %ld: row %ld is off by %g\n",
                    static_cast<int>(kind.dtype), (long)kind.group_size, kind.int8_activations, (long)tokens,
                    (long)rows, (long)columns, (long)r, error);
        std::exit(1);
      }
    }
  }
}

template <class Weight, class Value = Weight>
static void check_experts(const Kind& kind, int64_t tokens, int64_t hidden, int64_t inner, Activation activation) {
  constexpr int64_t kExperts = 3, kTop = 2;
  const bool gated = activation.gated;
  const int64_t first_rows = inner * (gated ? 2 : 1), in = (hidden + 63) / 64 * 64, middle = (inner + 63) / 64 * 64;
  const Layout gate_up = kind.layout(gated ? gated_rows(inner) : inner, in), down = kind.layout(hidden, middle);
  Aligned first(kExperts * gate_up.bytes()), second(kExperts * down.bytes());
  std::vector<Matrix> firsts, seconds;
  for (int64_t e = 0; e < kExperts; ++e) {
    firsts.push_back(
        Matrix::random(kind, gate_up, first_rows, gated ? inner : 0, first.data.get() + e * gate_up.bytes(), Weight{}));
    seconds.push_back(Matrix::random(kind, down, hidden, 0, second.data.get() + e * down.bytes(), Weight{}));
  }
  std::vector<Value> x(tokens * hidden), y(tokens * hidden), biases(kExperts * gate_up.rows),
      down_biases(kExperts * hidden);
  for (Value& value : x) value = Value::from_float(random_value() / 16);
  for (auto* list : {&biases, &down_biases})
    for (Value& value : *list) value = Value::from_float(random_value() / 4);
  if (gated)  // rows that pad the strips have no bias
    for (int64_t i = 0; i < kExperts * gate_up.rows; ++i)
      if (i % gate_up.rows / (2 * kStripRows) * kStripRows + i % kStripRows >= inner) biases[i] = Value::from_float(0);
  std::vector<int32_t> permutation(hidden), ids(tokens * kTop);
  for (int64_t c = 0; c < hidden; ++c) permutation[c] = static_cast<int32_t>(hidden - 1 - c);
  for (int32_t& id : ids) id = static_cast<int32_t>(random_bits() % (kExperts + 1)) - 1;
  std::vector<float> weights(tokens * kTop);
  for (float& weight : weights) weight = (1 + random_bits() % 8) / 8.0f;

  ExpertsArgs args{};
  args.num_experts = kExperts;
  args.tokens = tokens;
  args.top_k = kTop;
  args.hidden = hidden;
  args.gate_up = gate_up;
  args.down = down;
  args.act_dtype = dtype_of<Value>();
  args.gate_up_packed = first.data.get();
  args.down_packed = second.data.get();
  args.gate_up_bias = biases.data();
  args.down_bias = down_biases.data();
  args.x = x.data();
  args.x_stride = hidden;
  args.permutation = tokens % 2 ? permutation.data() : nullptr;
  args.activation = activation;
  args.ids = ids.data();
  args.weights = weights.data();
  args.y = y.data();
  experts(args, instruction_set());

  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> given(in), wanted(hidden), size(hidden);
    for (int64_t c = 0; c < hidden; ++c) given[c] = x[t * hidden + (args.permutation ? permutation[c] : c)].to_float();
    if (kind.int8_activations) given = rounded(given);
    for (int64_t k = 0; k < kTop; ++k) {
      const int32_t e = ids[t * kTop + k];
      if (e < 0) continue;
      std::vector<double> h(middle);
      const auto sum_of = [&](int64_t channel, int64_t part) {  // of its gate, or of its up
        const int64_t packed_row =
            gated ? (channel / kStripRows * 2 + part) * kStripRows + channel % kStripRows : channel;
        return firsts[e].product(part * inner + channel, given.data(), in) +
               biases[e * gate_up.rows + packed_row].to_float();
      };
      for (int64_t i = 0; i < inner; ++i) {
        const double g = sum_of(i, 0), f = gated ? g / (1 + std::exp(-activation.alpha * g)) : g > 0 ? g * g : 0;
        h[i] = gated ? f * (sum_of(i, 1) + activation.beta) : f;
      }
      double rounding = 0;  // what rounding to int8 may change, times 254
      if (kind.int8_activations)
        for (double value : h) rounding = std::fmax(rounding, std::fabs(value));
      for (int64_t r = 0; r < hidden; ++r) {
        const double sum = seconds[e].product(r, h.data(), middle) + down_biases[e * hidden + r].to_float();
        wanted[r] += weights[t * kTop + k] * sum;
        for (int64_t i = 0; i < middle; ++i)
          size[r] += std::fabs(seconds[e].dense[r * middle + i]) * (std::fabs(h[i]) + rounding);
      }
    }
    for (int64_t r = 0; r < hidden; ++r) {
      const double error = std::fabs(y[t * hidden + r].to_float() - wanted[r]);
      if (!(error <= std::fabs(wanted[r]) / 250 + size[r] / 250 + 1e-3)) {
        std::printf("experts: dtype %d int8 inputs %d tokens %ld %ld x %ld: row %ld is off by %g\n",
                    static_cast<int>(kind.dtype), kind.int8_activations, (long)tokens, (long)hidden, (long)inner,
                    (long)r, error);
        std::exit(1);
      }
    }
  }
}

static void check_refusal(const Layout& layout, int bits) {
  std::vector<uint16_t> values(5 * 32);
  const float scales[5] = {};
  const int64_t of = layout.pattern;
  std::vector<uint8_t> bitmask(5 * 8);
  for (size_t i = 0; i < bitmask.size(); ++i) bitmask[i] = static_cast<uint8_t>(of == 4 ? bits : bits >> i % 2 * 8);
  bool legal = true, refused = false;
  for (int64_t i = 0; i < 16; i += of)
    legal &= __builtin_popcount((of == 4 ? bits * 257 : bits) >> i & ((1 << of) - 1)) == of / 2;
  Aligned packed(layout.bytes());
  try {
    pack(layout, values.data(), bitmask.data(), {has_scales(layout.dtype) ? scales : nullptr, 0, Dtype::float32},
         packed.data.get());
  } catch (const std::runtime_error&) {
    refused = true;
  }
  if (refused == legal) {
    std::printf("%ld columns: bitmask %d: %s\n", (long)of, bits, refused ? "refused" : "taken");
    std::exit(1);
  }
}

int main() {
  for (int bits = 0; bits < 256; ++bits) check_refusal({5, 64, Dtype::bfloat16}, bits);
  for (int bits = 0; bits < 65536; bits += 7) check_refusal({5, 64, Dtype::int8, 0, Dtype::float32, true, 16}, bits);
  for (int bits = 0; bits < 65536; bits += 7) check_refusal({5, 64, Dtype::int4, 0, Dtype::float32, false, 16}, bits);
  int64_t turn = 0;
  for (int64_t tokens : {1, 2, 3, 4, 5, 7, 11, 12, 13, 21, 25, 41, 64, 65, 97, 200, 257}) {
    ++turn;
    for (int64_t number : {turn, turn + 1, turn + 3}) {  // half of the rows, each time others
      const int64_t rows = std::vector<int64_t>{1, 16, 17, 33, 65, 161}[number % 6];
      const int64_t columns = tokens % 2 ? 64 : 192;
      check<Bfloat16>({Dtype::bfloat16}, tokens, rows, columns);
      check<Float16>({Dtype::float16}, tokens, rows, columns);
      check<Float32>({Dtype::float32}, tokens, rows, columns);
      check<Bfloat16>({Dtype::bfloat16, 0, Dtype::float32, false, 16}, tokens, rows, columns);
      check<Float16>({Dtype::float16, 0, Dtype::float32, false, 16}, tokens, rows, columns);
      check<Float32>({Dtype::float32, 0, Dtype::float32, false, 16}, tokens, rows, columns);
      for (Dtype dtype : {Dtype::int8, Dtype::int4}) {
        check<Int8, Bfloat16>({dtype}, tokens, rows, columns);
        check<Int8, Bfloat16>({dtype, 32, Dtype::bfloat16}, tokens, rows, columns);
        check<Int8, Bfloat16>({dtype, 64}, tokens, rows, columns);
        check<Int8, Float16>({dtype, 64, Dtype::bfloat16}, tokens, rows, columns);
        check<Int8, Float32>({dtype}, tokens, rows, columns);
        check<Int8, Bfloat16>({dtype, 128, Dtype::bfloat16}, tokens, rows, 256);
        check<Int8, Bfloat16>({dtype, 0, Dtype::float32, true}, tokens, rows, columns);
        check<Int8, Float16>({dtype, 0, Dtype::float32, true}, tokens, rows, 320);
        check<Int8, Bfloat16>({dtype, 0, Dtype::float32, false, 16}, tokens, rows, columns);
        check<Int8, Float32>({dtype, 64, Dtype::bfloat16, false, 16}, tokens, rows, columns);
        check<Int8, Bfloat16>({dtype, 32, Dtype::float32, false, 16}, tokens, rows, columns);
        check<Int8, Bfloat16>({dtype, 0, Dtype::float32, true, 16}, tokens, rows, columns);
      }
      check<Int8, Float32>({Dtype::int4, 32, Dtype::bfloat16, true}, tokens, rows, columns);
      check<Int8, Bfloat16>({Dtype::int4, 64, Dtype::float32, true}, tokens, rows, columns);
      check<Int8, Float16>({Dtype::int4, 128, Dtype::bfloat16, true}, tokens, rows, 384);
      check<Int8, Float16>({Dtype::int4, 32, Dtype::bfloat16, true, 16}, tokens, rows, 320);
      check<Int8, Float32>({Dtype::int4, 64, Dtype::float32, true, 16}, tokens, rows, columns);
    }
  }
  const Activation swiglu = {Activation::silu, true, 1.702f, 1.0f, INFINITY},
                   relu = {Activation::relu2, false, 1, 0, 0};
  for (const Activation& activation : {swiglu, relu})
    for (int64_t tokens : {1, 2, 7, 40, 130})
      for (int64_t inner : {8, 64, 104}) {
        const int64_t hidden = tokens % 2 ? 72 : 128;
        check_experts<Bfloat16>({Dtype::bfloat16}, tokens, hidden, inner, activation);
        check_experts<Float16>({Dtype::float16}, tokens, hidden, inner, activation);
        check_experts<Float32>({Dtype::float32}, tokens, hidden, inner, activation);
        for (Dtype dtype : {Dtype::int8, Dtype::int4}) {
          check_experts<Int8, Bfloat16>({dtype}, tokens, hidden, inner, activation);
          check_experts<Int8, Bfloat16>({dtype, 64, Dtype::bfloat16}, tokens, hidden, inner, activation);
          check_experts<Int8, Float16>({dtype}, tokens, hidden, inner, activation);
          check_experts<Int8, Float32>({dtype, 32, Dtype::bfloat16}, tokens, hidden, inner, activation);
          check_experts<Int8, Bfloat16>({dtype, 0, Dtype::float32, true}, tokens, hidden, inner, activation);
          check_experts<Int8, Bfloat16>({dtype, 0, Dtype::float32, true, 16}, tokens, hidden, inner, activation);
          check_experts<Int8, Bfloat16>({dtype, 0, Dtype::float32, false, 16}, tokens, hidden, inner, activation);
        }
        check_experts<Int8, Float16>({Dtype::int4, 64, Dtype::float32, true}, tokens, hidden, inner, activation);
        check_experts<Int8, Float32>({Dtype::int4, 32, Dtype::bfloat16, true}, tokens, hidden, inner, activation);
      }
  check_experts<Bfloat16>({Dtype::bfloat16}, 500, 64, 16, swiglu);  // several passes of an expert
  std::printf("ok %s\n", instruction_set().name);
}
