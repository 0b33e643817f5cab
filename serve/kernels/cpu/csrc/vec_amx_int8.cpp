// AMX with int8 tiles, and AVX-512 to expand weights into them. Few tokens take AVX-512 VNNI.
#include <algorithm>

#include "amx_int8.h"
#include "tile_configuration.h"

namespace {

constexpr int64_t kDensePrefetchBytes = 512;

// sums[group][digit][row] = the products of 16 rows of weights, a tile as they are stored, with G groups of digits.
template <int G>
void multiply_dense_tiles(const int8_t* weights, const int8_t* digits, int64_t columns, int32_t* sums) {
  alignas(kCacheLine) int32_t products[kStripRows][kGroupDigits];
  const int64_t group_bytes = kGroupDigits * columns;
  _tile_zero(0);
  if constexpr (G > 1) _tile_zero(1);
  if constexpr (G > 2) _tile_zero(2);
  if constexpr (G > 3) _tile_zero(3);
  for (int64_t c = 0; c < columns; c += kCacheLine) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kStripRows; ++r) __builtin_prefetch(weights + r * columns + c + kDensePrefetchBytes, 0, 2);
    const int8_t* step = digits + c * kGroupDigits;
    _tile_loadd(6, weights + c, columns);
    _tile_loadd(4, step, kCacheLine);
    _tile_dpbssd(0, 6, 4);
    if constexpr (G > 1) {
      _tile_loadd(5, step + group_bytes, kCacheLine);
      _tile_dpbssd(1, 6, 5);
    }
    if constexpr (G > 2) {
      _tile_loadd(4, step + 2 * group_bytes, kCacheLine);
      _tile_dpbssd(2, 6, 4);
    }
    if constexpr (G > 3) {
      _tile_loadd(5, step + 3 * group_bytes, kCacheLine);
      _tile_dpbssd(3, 6, 5);
    }
  }
  const auto take = [&](int64_t group) {
    tile_barrier();
    int32_t* to = sums + group * kGroupDigits * kTileRows;
    for (int64_t d = 0; d < kGroupDigits; ++d)
      for (int64_t r = 0; r < kStripRows; ++r) to[d * kTileRows + r] = products[r][d];
    tile_barrier();
  };
  _tile_stored(0, products, kCacheLine);
  take(0);
  if constexpr (G > 1) {
    _tile_stored(1, products, kCacheLine);
    take(1);
  }
  if constexpr (G > 2) {
    _tile_stored(2, products, kCacheLine);
    take(2);
  }
  if constexpr (G > 3) {
    _tile_stored(3, products, kCacheLine);
    take(3);
  }
}

void multiply_dense_amx(const DenseArgs& args, int64_t begin, int64_t end) {
  if (!args.grouped_digits) return multiply_dense<Avx512VnniTraits>(args, begin, end);
  constexpr int64_t groups_at_once = 4, group_tokens = kGroupDigits / 2;
  constexpr decltype(&multiply_dense_tiles<1>) multiply[] = {multiply_dense_tiles<1>, multiply_dense_tiles<2>,
                                                             multiply_dense_tiles<3>, multiply_dense_tiles<4>};
  const int64_t whole = std::min(end, args.rows / kTileRows), groups = (args.tokens + group_tokens - 1) / group_tokens;
  if (whole < end) multiply_dense<Avx512VnniTraits>(args, std::max(begin, whole), end);
  const TileConfiguration configuration(kStripRows);
  int32_t sums[groups_at_once * kGroupDigits * kTileRows];
  for (int64_t tile = begin; tile < whole; ++tile)
    for (int64_t group = 0; group < groups; group += groups_at_once) {
      const int64_t first = group * group_tokens, count = std::min(groups - group, groups_at_once);
      for (int64_t r = 0; r < kTileRows; r += kStripRows)
        multiply[count - 1](args.weights + (tile * kTileRows + r) * args.columns,
                            args.grouped_digits + group * kGroupDigits * args.columns, args.columns, sums + r);
      finish_dense<Avx512VnniTraits>(args, tile * kTileRows, first,
                                     std::min(args.tokens - first, groups_at_once * group_tokens), sums);
    }
}

}  // namespace

const ria::Int8Products ria::kAmxInt8Of16 = amx_int8_products<Avx512Of16Traits>();
const ria::Int8Kernels ria::kAmxInt8Activations = {amx_int8_products<Avx512VnniTraits>(), &ria::kAmxInt8Of16,
                                                   quantize_token<Avx512VnniTraits, 0>, multiply_dense_amx, 3};
