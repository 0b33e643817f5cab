// Activations of experts, and the weighted sum of their results. Plain loops, which the compiler vectorises for each
// instruction set. No function here is inlined: all callers must get the same bits.
#pragma once
#include <math.h>

#include "kernels.h"
#include "scalar.h"

namespace {

using namespace ria;

// e^x within 2 units in the last place, by Cephes' polynomial. Below 1e-38 it is 1e-38.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer, in the low bits
  const float bounded = x < -87.3f ? -87.3f : x;
  const float shifted = bounded * 1.44269504088896341f + kRound, n = shifted - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Half of the exponent at a time: 2^128 is not a float, but the result may be.
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const float low = float_from_bits(static_cast<uint32_t>(exponent / 2 + 127) << 23);
  const float high = float_from_bits(static_cast<uint32_t>(exponent - exponent / 2 + 127) << 23);
  return x > 88.73f ? INFINITY : p * low * high;
}

template <Activation::Kind kKind>
float function(const Activation& a, float g) {
  switch (kKind) {
    case Activation::gelu: return 0.5f * g * (1.0f + erff(g * 0.70710678f));
    case Activation::gelu_tanh: return g / (1.0f + exp_of(-1.59576912f * (g + 0.044715f * g * g * g)));
    case Activation::relu2: return g < 0.0f ? 0.0f : g * g;
    default: return g / (1.0f + exp_of(-a.alpha * g));
  }
}

// Comparisons let a NaN through.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }

template <Activation::Kind kKind>
__attribute__((noinline)) void activate_as(const Activation activation, float* sums, int64_t tokens, int64_t rows) {
  constexpr bool kStep = kKind == Activation::swiglustep;
  const float limit = activation.limit, beta = activation.beta;
  for (int64_t t = 0; t < tokens; ++t, sums += kTileRows) {
    if (activation.gated) {
      const float* ups = sums + kStripRows;
      for (int64_t r = 0; r < kStripRows; ++r) {
        const float gate = function<kKind>(activation, kStep ? sums[r] : at_most(sums[r], limit));
        const float up = ups[r] < -limit ? -limit : at_most(ups[r], limit);
        sums[r] = (kStep ? at_most(gate, limit) : gate) * (up + beta);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) sums[r] = function<kKind>(activation, sums[r]);
    }
  }
}

// Replaces the sums [tokens][kTileRows] of a tile's rows by their activations.
inline void activate(const Activation& activation, float* sums, int64_t tokens, int64_t rows) {
  switch (activation.kind) {
    case Activation::silu: return activate_as<Activation::silu>(activation, sums, tokens, rows);
    case Activation::gelu: return activate_as<Activation::gelu>(activation, sums, tokens, rows);
    case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(activation, sums, tokens, rows);
    case Activation::relu2: return activate_as<Activation::relu2>(activation, sums, tokens, rows);
    default: return activate_as<Activation::swiglustep>(activation, sums, tokens, rows);
  }
}

// to[rows] += weight * sums[rows]
__attribute__((noinline)) void add_weighted(float* to, const float* sums, float weight, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) to[r] += weight * sums[r];
}

}  // namespace
