// The output's way into the caches before it is stored.
#pragma once
#include "kernels.h"

namespace {

using namespace ria;

struct TokenRange { int64_t first, count; };

// Prefetches where a tile's rows of some tokens in y will be. Each token's are on another page, and storing them would
// wait for memory every time. While the parts [begin, end) of `parts` of the columns are multiplied, it prefetches as
// large a share of the tokens.
inline void prefetch_output(const GemmArgs& args, int64_t tile, TokenRange tokens, int64_t begin, int64_t end,
                            int64_t parts) {
  if (args.activation || args.combined) return;
  const int64_t item = bits(args.act_dtype) / 8, stride = args.layout.rows * item, first = tile * kTileRows * item;
  const int64_t bytes = stride - first < kTileRows * item ? stride - first : kTileRows * item;
  const uint8_t* y = static_cast<const uint8_t*>(args.y) + first + tokens.first * stride;
  for (int64_t t = tokens.count * begin / parts; t < tokens.count * end / parts; ++t)
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(y + t * stride + byte, 1, 2);
}

}  // namespace
