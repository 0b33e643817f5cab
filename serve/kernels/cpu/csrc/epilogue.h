// What happens to a tile's sums.
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

// The rows of a tile.
struct TileRows {
  const int64_t first, padded;  // with those that its last strip lacks: their sums are 0
  const int64_t count;
  TileRows(const Layout& layout, int64_t tile)
      : first(tile * kTileRows),
        padded(layout.strips_in(tile) * kStripRows),
        count(layout.rows - first < padded ? layout.rows - first : padded) {}
};

// What becomes of the results [tokens][kTileRows] of `tokens` tokens: y, or y after the activation, or a part of the
// combination. store(results, tokens, first, stride, count) rounds `count` results of each token to y, from its element
// `first` on, tokens `stride` elements apart.
template <class Store>
void finish_sums(const GemmArgs& args, const TileRows& rows, float* results, int64_t first_token, int64_t tokens,
                 const Store& store) {
  if (args.activation) {
    activate(*args.activation, results, tokens, rows.padded);
    const int64_t parts = args.activation->gated ? 2 : 1;
    store(results, tokens, first_token * args.y_stride + rows.first / parts, args.y_stride, rows.padded / parts);
  } else if (args.combined) {
    float* to = args.combined + rows.first - args.combined_begin;
    for (int64_t t = 0; t < tokens; ++t)
      add_weighted(to + args.combined_rows[first_token + t] * args.combined_stride, results + t * kTileRows,
                   args.weights[first_token + t], rows.padded);
  } else {
    store(results, tokens, first_token * args.layout.rows + rows.first, args.layout.rows, rows.count);
  }
}

// The initial value of a tile's sums (the bias), and their way to y (scales, bias, activation or combination,
// rounding). `VecTraits` is described in gemm_rows.h.
template <class VecTraits>
struct Epilogue {
  static constexpr bool kHasScales = has_scales(VecTraits::kDtype) && !VecTraits::kGrouped;  // one per row
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, initial[kTileRows] = {};
  const GemmArgs& args;
  const TileRows rows;

  Epilogue(const GemmArgs& args, int64_t tile) : args(args), rows(args.layout, tile) {
    const Layout& layout = args.layout;
    if (args.bias)
      with_activation<VecTraits>(args.act_dtype, [&](auto value) {
        const auto* from = static_cast<const decltype(value)*>(args.bias) + rows.first;
        for (int64_t r = 0; r < rows.count; ++r) bias[r] = from[r].to_float();
      });
    if constexpr (kHasScales)
      std::memcpy(scales, args.packed + layout.row_scales_offset() + rows.first * sizeof(float),
                  rows.count * sizeof(float));
    else
      std::memcpy(initial, bias, sizeof initial);
  }
  // Takes the sums [tokens][kTileRows] of `tokens` tokens, which it overwrites.
  void apply(float* sums, int64_t first_token, int64_t tokens) const {
    if constexpr (kHasScales)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows.padded; ++r)
          sums[t * kTileRows + r] = sums[t * kTileRows + r] * scales[r] + bias[r];
    finish_sums(args, rows, sums, first_token, tokens,
                [&](const float* from, int64_t tokens, int64_t first, int64_t stride, int64_t count) {
                  with_activation<VecTraits>(args.act_dtype, [&](auto value) {
                    auto* y = static_cast<decltype(value)*>(args.y) + first;
                    for (int64_t t = 0; t < tokens; ++t)
                      VecTraits::store_from_float(y + t * stride, from + t * kTileRows, count);
                  });
                });
  }
};

}  // namespace
