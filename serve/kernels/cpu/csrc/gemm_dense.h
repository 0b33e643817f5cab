// The product with a dense matrix in int8 whose rows are as they are stored: a head, from which rows are looked up,
// too.
//
// A token is rounded to two int8 numbers a channel, each with a scale for the token: the second ones round what the
// first ones leave. So rounding loses less than bfloat16 does, and few tokens cost no more, because memory is the
// limit. The sums are exact, so every instruction set gives the same bits.
//
// A `VecTraits` of gemm_int8.h has, for this:
//
//     using Dense, DenseSums;                         // registers: of weights or activations, and of sums
//     static constexpr int64_t kDenseBytes;           // in a register
//     static constexpr int64_t kDenseRows;            // rows of weights that are multiplied at a time
//     static Dense load_dense(const void*);           // weights
//     static Dense load_digits(const void*);          // activations, plus kOffset
//     static Dense offset();                          // kOffset in each byte, if it is not 0
//     static DenseSums dense_zero();
//     static DenseSums dense_dot(DenseSums, const Dense& activations, const Dense& weights);
//     static int32_t total(DenseSums);
#pragma once
#include "quantize_tokens.h"

namespace {

constexpr int64_t kDenseDigits = 4;  // rows of activations that are multiplied at a time, two for each token

// What becomes of a tile's sums [2 * tokens][kTileRows].
template <class VecTraits>
void finish_dense(const DenseArgs& args, int64_t first_row, int64_t first_token, int64_t tokens, const int32_t* sums) {
  const int64_t left = args.rows - first_row, count = left < kTileRows ? left : kTileRows;
  const int64_t item = bits(args.act_dtype) / 8;
  alignas(kCacheLine) float bias[kTileRows] = {}, scales[kTileRows] = {}, results[kTileRows];
  std::memcpy(scales, args.scales + first_row, count * sizeof(float));
  if (args.bias)
    load_floats<VecTraits>(args.act_dtype, static_cast<const uint8_t*>(args.bias) + first_row * item, bias, count);
  for (int64_t t = first_token; t < first_token + tokens; ++t, sums += 2 * kTileRows) {
    const float first = args.digit_scales[2 * t], second = args.digit_scales[2 * t + 1];
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float low = static_cast<float>(sums[kTileRows + r]) * second;
      results[r] = (static_cast<float>(sums[r]) * first + low) * scales[r] + bias[r];
    }
    store_floats<VecTraits>(args.act_dtype, results, static_cast<uint8_t*>(args.y) + (t * args.rows + first_row) * item,
                            count);
  }
}

// sums[digit][row] = the products of R rows of weights, from `weights` on, with D rows of activations. The next R rows
// are prefetched in the order of their addresses: processors do not see R short streams coming.
template <class VecTraits, int R, int D>
void multiply_dense_rows(const int8_t* weights, const int8_t* digits, int64_t columns, int32_t* sums) {
  typename VecTraits::DenseSums acc[D][R], offsets[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    offsets[r] = VecTraits::dense_zero();
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[d][r] = VecTraits::dense_zero();
  }
  for (int64_t c = 0; c < columns; c += VecTraits::kDenseBytes) {
    typename VecTraits::Dense w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(weights + R * (columns + c) + r * VecTraits::kDenseBytes, 0, 2);
      w[r] = VecTraits::load_dense(weights + r * columns + c);
      if constexpr (VecTraits::kOffset != 0) offsets[r] = VecTraits::dense_dot(offsets[r], VecTraits::offset(), w[r]);
    }
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      const typename VecTraits::Dense x = VecTraits::load_digits(digits + d * columns + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[d][r] = VecTraits::dense_dot(acc[d][r], x, w[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const int32_t offset = VecTraits::kOffset != 0 ? VecTraits::total(offsets[r]) : 0;
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) sums[d * kTileRows + r] = VecTraits::total(acc[d][r]) - offset;
  }
}

// The same with all `count` rows of activations, an even number.
template <class VecTraits, int R>
void multiply_dense_tokens(const int8_t* weights, const int8_t* digits, int64_t count, int64_t columns, int32_t* sums) {
  int64_t d = 0;
  for (; d + kDenseDigits <= count; d += kDenseDigits)
    multiply_dense_rows<VecTraits, R, kDenseDigits>(weights, digits + d * columns, columns, sums + d * kTileRows);
  if (d < count) multiply_dense_rows<VecTraits, R, 2>(weights, digits + d * columns, columns, sums + d * kTileRows);
}

// The tiles [begin, end) of kTileRows rows.
template <class VecTraits>
void multiply_dense(const DenseArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t pass = 8, R = VecTraits::kDenseRows;  // tokens whose sums are there at a time
  int32_t sums[2 * pass * kTileRows] = {};
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * kTileRows, left = args.rows - first_row,
                  rows = left < kTileRows ? left : kTileRows;
    const int8_t* weights = args.weights + first_row * args.columns;
    for (int64_t first = 0; first < args.tokens; first += pass) {
      const int64_t tokens = args.tokens - first < pass ? args.tokens - first : pass;
      const int8_t* digits = args.digits + 2 * first * args.columns;
      int64_t r = 0;
      for (; r + R <= rows; r += R)
        multiply_dense_tokens<VecTraits, R>(weights + r * args.columns, digits, 2 * tokens, args.columns, sums + r);
      for (; r < rows; ++r)
        multiply_dense_tokens<VecTraits, 1>(weights + r * args.columns, digits, 2 * tokens, args.columns, sums + r);
      finish_dense<VecTraits>(args, first_row, first, tokens, sums);
    }
  }
}

}  // namespace
