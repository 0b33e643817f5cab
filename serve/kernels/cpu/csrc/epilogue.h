// What happens to a tile's sums. `VecTraits` is described in gemm_rows.h.
#pragma once
#include <cstring>

#include "activation.h"
#include "kernels.h"
#include "scalar.h"

namespace {

using namespace ria;

// body(a value of the activations' type), which fp32 lanes with integer weights learn only here.
template <class VecTraits, class Body>
void with_activation(Dtype act_dtype, const Body& body) {
  if constexpr (VecTraits::kAnyActivations) {
    if (act_dtype == Dtype::float16) return body(Float16{});
    if (act_dtype == Dtype::float32) return body(Float32{});
  }
  body(typename VecTraits::Value{});
}

// The initial value of a tile's sums (the bias), and their way to y (scales, bias, activation or combination,
// rounding).
template <class VecTraits>
struct Epilogue {
  static constexpr bool kHasScales = has_scales(VecTraits::kDtype) && !VecTraits::kGrouped;  // one per row
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, initial[kTileRows] = {};
  const GemmArgs& args;
  const int64_t first_row, padded_rows, rows;

  Epilogue(const GemmArgs& args, int64_t tile)
      : args(args),
        first_row(tile * kTileRows),
        padded_rows(args.layout.strips_in(tile) * kStripRows),
        rows(args.layout.rows - first_row < padded_rows ? args.layout.rows - first_row : padded_rows) {
    const Layout& layout = args.layout;
    if (args.bias)
      with_activation<VecTraits>(args.act_dtype, [&](auto value) {
        const auto* from = static_cast<const decltype(value)*>(args.bias) + first_row;
        for (int64_t r = 0; r < rows; ++r) bias[r] = from[r].to_float();
      });
    if constexpr (kHasScales)
      std::memcpy(scales, args.packed + layout.row_scales_offset() + first_row * sizeof(float), rows * sizeof(float));
    else
      std::memcpy(initial, bias, sizeof initial);
  }
  // Takes the sums [tokens][kTileRows] of `tokens` tokens, which it overwrites.
  void apply(float* sums, int64_t first_token, int64_t tokens) const {
    if constexpr (kHasScales)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < padded_rows; ++r)
          sums[t * kTileRows + r] = sums[t * kTileRows + r] * scales[r] + bias[r];
    if (args.activation)
      activate_all(sums, first_token, tokens);
    else if (args.combined)
      combine(sums, first_token, tokens);
    else
      store(sums, tokens, first_token * args.layout.rows + first_row, args.layout.rows, rows);
  }
  // `count` sums of each token, from the element `first` of y on, tokens `stride` elements apart.
  void store(const float* sums, int64_t tokens, int64_t first, int64_t stride, int64_t count) const {
    with_activation<VecTraits>(args.act_dtype, [&](auto value) {
      auto* y = static_cast<decltype(value)*>(args.y) + first;
      for (int64_t t = 0; t < tokens; ++t) VecTraits::store_from_float(y + t * stride, sums + t * kTileRows, count);
    });
  }
  void activate_all(float* sums, int64_t first_token, int64_t tokens) const {
    activate(*args.activation, sums, tokens, padded_rows);
    const int64_t parts = args.activation->gated ? 2 : 1;
    store(sums, tokens, first_token * args.y_stride + first_row / parts, args.y_stride, padded_rows / parts);
  }
  void combine(const float* sums, int64_t first_token, int64_t tokens) const {
    float* to = args.combined + first_row - args.combined_begin;
    for (int64_t t = 0; t < tokens; ++t)
      add_weighted(to + args.combined_rows[first_token + t] * args.combined_stride, sums + t * kTileRows,
                   args.weights[first_token + t], padded_rows);
  }
};

}  // namespace
