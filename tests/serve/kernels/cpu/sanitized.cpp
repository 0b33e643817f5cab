// The C++ beneath the operators, under sanitizers: one instruction set over shapes with partial tiles and blocks, in
// buffers of exactly the promised size, against a double-precision product; then bitmasks that are not 2:4.
// Prints "ok" and the name of the instruction set, which RIA_VLLM_CPU_ISA chooses.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
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
  explicit Aligned(int64_t bytes) : data(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)), std::free) {}
  std::unique_ptr<uint8_t, void (*)(void*)> data;
};

template <class Weight, class Value = Weight>
static void check(Dtype dtype, int64_t tokens, int64_t rows, int64_t columns) {
  const Layout layout{rows, columns, dtype};
  std::vector<Weight> values(rows * columns / 2);
  std::vector<Value> x(tokens * columns), bias(rows), y(tokens * rows);
  std::vector<float> scales(rows);
  std::vector<uint8_t> bitmask(rows * columns / 8);
  std::vector<int32_t> permutation(columns);
  for (Weight& value : values) value = Weight::from_float(has_scales(dtype) ? 8 * random_value() : random_value());
  for (auto* list : {&x, &bias})
    for (Value& value : *list) value = Value::from_float(random_value());
  for (float& scale : scales) scale = has_scales(dtype) ? (1 + random_bits() % 4) / 64.0f : 1.0f;
  for (uint8_t& byte : bitmask) byte = kLegal[random_bits() % 6] | kLegal[random_bits() % 6] << 4;
  for (int64_t c = 0; c < columns; ++c) permutation[c] = static_cast<int32_t>(columns - 1 - c);
  Aligned packed(layout.bytes());
  pack(layout, values.data(), bitmask.data(), scales.data(), packed.data.get());

  GemmArgs args{};
  args.layout = layout;
  args.packed = packed.data.get();
  args.x = x.data();
  args.x_stride = columns;
  args.permutation = permutation.data();
  args.bias = bias.data();
  args.y = y.data();
  linear(args, tokens, instruction_set());

  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bias[r].to_float();
      for (int64_t c = 0, kept = r * columns / 2; c < columns; ++c)
        if (bitmask[(r * columns + c) / 8] >> (c % 8) & 1)
          sum +=
              static_cast<double>(values[kept++].to_float()) * scales[r] * x[t * columns + permutation[c]].to_float();
      const double error = std::fabs(y[t * rows + r].to_float() - sum);
      if (!(error <= std::fabs(sum) / 250 + 1e-3)) {
        std::printf("dtype %d tokens %ld %ld x %ld: row %ld is off by %g\n", static_cast<int>(dtype), (long)tokens,
                    (long)rows, (long)columns, (long)r, error);
        std::exit(1);
      }
    }
}

static void check_refusal() {
  const Layout layout{5, 64, Dtype::bfloat16};
  std::vector<uint16_t> values(5 * 32);
  for (int byte = 0; byte < 256; ++byte) {
    std::vector<uint8_t> bitmask(5 * 8, static_cast<uint8_t>(byte));
    bool legal = __builtin_popcount(byte & 15) == 2 && __builtin_popcount(byte >> 4) == 2, refused = false;
    Aligned packed(layout.bytes());
    try {
      pack(layout, values.data(), bitmask.data(), nullptr, packed.data.get());
    } catch (const std::runtime_error&) {
      refused = true;
    }
    if (refused == legal) {
      std::printf("bitmask byte %d: %s\n", byte, refused ? "refused" : "taken");
      std::exit(1);
    }
  }
}

int main() {
  check_refusal();
  for (int64_t rows : {1, 16, 17, 33, 65, 161})
    for (int64_t tokens : {1, 2, 3, 4, 5, 7, 11, 12, 13, 21, 25, 41, 64, 65, 97, 200, 257}) {
      const int64_t columns = tokens % 2 ? 64 : 192;
      check<Bfloat16>(Dtype::bfloat16, tokens, rows, columns);
      check<Float16>(Dtype::float16, tokens, rows, columns);
      check<Float32>(Dtype::float32, tokens, rows, columns);
      check<Int8, Bfloat16>(Dtype::int8, tokens, rows, columns);
    }
  std::printf("ok %s\n", instruction_set().name);
}
