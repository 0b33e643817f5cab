// The driver of products with a dense matrix in int8: rounds the tokens and divides the rows among threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace ria {
namespace {

constexpr int64_t kRoundGrain = 1 << 14;  // channels that are worth a thread
constexpr int64_t kRowsGrain = 1 << 16;   // bytes of weights that a thread takes at a time

struct Rounding {
  const DenseArgs& args;
  const uint8_t* x;
  int64_t stride;  // bytes
  int8_t* digits;
  float* scales;
  const Int8Kernels& kernels;

  float value(const uint8_t* token, int64_t c) const {
    if (args.act_dtype == Dtype::float32) return reinterpret_cast<const float*>(token)[c];
    const uint16_t stored = reinterpret_cast<const uint16_t*>(token)[c];
    return args.act_dtype == Dtype::bfloat16 ? Bfloat16{stored}.to_float() : Float16{stored}.to_float();
  }
  void round(int64_t begin, int64_t end) const {
    thread_local Scratch scratch;
    float* rest = reinterpret_cast<float*>(scratch.bytes(args.columns * static_cast<int64_t>(sizeof(float))));
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* token = x + t * stride;
      int8_t* to = digits + 2 * t * args.columns;
      const float scale = kernels.quantize(args.act_dtype, token, args.columns, reinterpret_cast<uint8_t*>(to));
      for (int64_t c = 0; c < args.columns; ++c) rest[c] = value(token, c) - static_cast<float>(to[c]) * scale;
      scales[2 * t] = scale;
      scales[2 * t + 1] = kernels.quantize(Dtype::float32, reinterpret_cast<const uint8_t*>(rest), args.columns,
                                           reinterpret_cast<uint8_t*>(to + args.columns));
    }
  }
};

// Puts the digits of the groups [begin, end) together, four channels of each.
struct Grouping {
  const DenseArgs& args;
  int8_t* to;

  void group(int64_t begin, int64_t end) const {
    const int64_t digits = 2 * args.tokens, columns = args.columns;
    for (int64_t g = begin; g < end; ++g)
      for (int64_t d = 0; d < kGroupDigits; ++d) {
        int8_t* place = to + g * kGroupDigits * columns + 4 * d;
        const int8_t* from = args.digits + (g * kGroupDigits + d) * columns;
        const bool there = g * kGroupDigits + d < digits;
        for (int64_t c = 0; c < columns; c += 4, place += 4 * kGroupDigits)
          there ? std::memcpy(place, from + c, 4) : std::memset(place, 0, 4);
      }
  }
};

struct Rows {
  const DenseArgs& args;
  const Int8Kernels& kernels;
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int64_t tiles_per_item = std::max<int64_t>(kRowsGrain / (args.columns * kTileRows), 1);
  std::atomic<int64_t> next{0};

  void multiply() {
    for (int64_t tile; (tile = next.fetch_add(tiles_per_item, std::memory_order_relaxed)) < tiles;)
      kernels.multiply_dense(args, tile, std::min(tile + tiles_per_item, tiles));
  }
};

}  // namespace

void dense_linear(DenseArgs args, const void* x, int64_t x_stride, const InstructionSet& set) {
  thread_local Scratch scratch;
  const int64_t digits = 2 * args.tokens, scale_bytes = (digits * 4 + kCacheLine - 1) / kCacheLine * kCacheLine;
  const Int8Kernels& kernels = *set.int8_activations;
  const bool grouped = args.tokens >= kernels.min_grouped_tokens;
  const int64_t groups = (digits + kGroupDigits - 1) / kGroupDigits, digit_bytes = digits * args.columns;
  uint8_t* memory = scratch.bytes(scale_bytes + digit_bytes + (grouped ? groups * kGroupDigits * args.columns : 0));
  Rounding rounding{args,
                    static_cast<const uint8_t*>(x),
                    x_stride * bits(args.act_dtype) / 8,
                    reinterpret_cast<int8_t*>(memory + scale_bytes),
                    reinterpret_cast<float*>(memory),
                    kernels};
  parallel_for(
      args.tokens, std::max<int64_t>(kRoundGrain / args.columns, 1),
      [](int64_t begin, int64_t end, void* context) { static_cast<Rounding*>(context)->round(begin, end); }, &rounding);
  args.digits = rounding.digits;
  args.digit_scales = rounding.scales;
  if (grouped) {
    Grouping grouping{args, rounding.digits + digit_bytes};
    args.grouped_digits = grouping.to;
    parallel_for(
        groups, 1,
        [](int64_t begin, int64_t end, void* context) { static_cast<Grouping*>(context)->group(begin, end); },
        &grouping);
  }
  Rows rows{args, kernels};
  parallel_for(threads(), 1, [](int64_t, int64_t, void* context) { static_cast<Rows*>(context)->multiply(); }, &rows);
}

}  // namespace ria
