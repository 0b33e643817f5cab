// The driver for a layer's experts. Tokens are grouped by expert, and an expert's tokens are divided into passes. First
// come the products with gate and up, whose items of work are some tiles of a pass; the thread that finishes a pass
// packs what the activation made of it. Then come the products with down: an item is a few rows of every expert, so
// that a thread can add all that these rows contribute to a token, in the order of the experts, without waiting for
// another. So a token's result depends neither on its batch nor on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace ria {
namespace {

// The most tokens at a time. They bound the memory that a call takes; every round reads the weights again.
constexpr int64_t kRoundTokens = 2048;
// Bytes of a thread's sums for the rows of down that it works on: they stay in the L2 cache beside a pass's panel.
constexpr int64_t kCombinedBytes = 512 << 10;
// The most tiles of down in an item: a pass's panel is brought into the L2 cache once for all of them.
constexpr int64_t kDownTiles = 4;
// Work items per thread, as in linear.cpp.
constexpr int64_t kItemsPerThread = 12;
// A few tokens take as long as one, because reading the weights takes longer. So a pass counts as this many more.
constexpr int64_t kReadingTokens = 4;
// Activations that a thread copies in about 10 microseconds: fewer are not worth a barrier.
constexpr int64_t kCopyGrain = 32 << 10;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Pass {
  int64_t expert, first, tokens;  // tokens, grouped by expert
  const Kernel* kernel;
  int64_t panel;   // offset of its packed intermediate channels
  int64_t pieces;  // that its tiles of gate and up are divided into
};

// Some tiles of gate and up.
struct Item { int64_t pass, begin, end; };

// `all`: of this round's tokens.
struct Round {
  const ExpertsArgs& all;
  const int64_t item_bytes = bits(all.act_dtype) / 8;
  const Kernels& kernels;
  const int64_t tokens = all.tokens;
  std::vector<int32_t> rows;   // of x, grouped by expert
  std::vector<float> weights;  // the router's, likewise
  std::vector<Pass> passes;
  std::vector<Item> items;
  std::unique_ptr<std::atomic<int64_t>[]> pieces_left;  // of each pass
  uint8_t *intermediate, *panels;
  int64_t down_tiles;
  std::atomic<int64_t> next_item{0}, next_down{0};

  Round(const ExpertsArgs& all, const InstructionSet& set)
      : all(all), kernels(set.kernels_for(all.down, all.act_dtype)) {
    group();
    divide();
    const int64_t row_bytes = tokens * kTileRows * static_cast<int64_t>(sizeof(float));
    const int64_t shared = all.down.tiles() / (threads() * kItemsPerThread);
    down_tiles = std::max<int64_t>(std::min({shared, kDownTiles, kCombinedBytes / row_bytes}), 1);
  }

  // Counts, then places: each expert's tokens in their own order.
  void group() {
    std::vector<int64_t> ends(all.num_experts + 1);
    const int64_t pairs = tokens * all.top_k;
    for (int64_t i = 0; i < pairs; ++i) ++ends[all.ids[i] + 1];
    ends[0] = 0;  // pairs without an expert
    for (int64_t e = 0; e < all.num_experts; ++e) ends[e + 1] += ends[e];
    const int64_t used = ends[all.num_experts];
    rows.resize(used);
    weights.resize(used);
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t i = 0; i < pairs; ++i) {
      if (all.ids[i] < 0) continue;
      const int64_t to = next[all.ids[i]]++;
      rows[to] = static_cast<int32_t>(i / all.top_k);
      weights[to] = all.weights[i];
    }
    int64_t panel_bytes = 0;
    for (int64_t e = 0; e < all.num_experts; ++e) panel_bytes = add_passes(e, ends[e], ends[e + 1], panel_bytes);
    thread_local Scratch intermediate_scratch, panel_scratch;
    intermediate = intermediate_scratch.bytes(used * all.down.columns * item_bytes);
    panels = panel_scratch.bytes(panel_bytes);
  }
  int64_t add_passes(int64_t expert, int64_t first, int64_t end, int64_t panel_bytes) {
    if (first == end) return panel_bytes;
    const Kernel& kernel = kernels.fastest(end - first);
    const int64_t token_bytes = std::max(kernel.panel_bytes(all.gate_up), kernel.panel_bytes(all.down));
    const int64_t count = ceil_div(end - first, max_pass_tokens(token_bytes, kernel));
    const int64_t pass_tokens = ceil_div(ceil_div(end - first, count), kernel.pass_step) * kernel.pass_step;
    for (; first < end; first += pass_tokens) {
      const Pass pass = {expert, first, std::min(pass_tokens, end - first), &kernel, panel_bytes, 1};
      panel_bytes += ceil_div(blocks_of(pass).capacity() * kernel.panel_bytes(all.down), 64) * 64;
      passes.push_back(pass);
    }
    return panel_bytes;
  }
  // Divides gate and up of each pass by how long they take. The longest come first, so that no thread starts on one of
  // them when the others are done.
  void divide() {
    int64_t all_cost = 0;
    for (const Pass& pass : passes) all_cost += pass.tokens + kReadingTokens;
    pieces_left.reset(new std::atomic<int64_t>[passes.size()]);
    const int64_t tiles = all.gate_up.tiles();
    for (size_t i = 0; i < passes.size(); ++i) {
      const int64_t cost = passes[i].tokens + kReadingTokens;
      const int64_t wanted = std::clamp<int64_t>(cost * threads() * kItemsPerThread / all_cost, 1, tiles);
      const int64_t piece = ceil_div(tiles, wanted);
      pieces_left[i] = passes[i].pieces = ceil_div(tiles, piece);
      for (int64_t begin = 0; begin < tiles; begin += piece)
        items.push_back({static_cast<int64_t>(i), begin, std::min(begin + piece, tiles)});
    }
    const auto cost = [&](const Item& item) {
      return (passes[item.pass].tokens + kReadingTokens) * (item.end - item.begin);
    };
    std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
  }

  static TokenBlocks blocks_of(const Pass& pass) { return {pass.tokens, pass.kernel->block_tokens, pass.kernel->step}; }
  uint8_t* intermediate_of(const Pass& pass) const { return intermediate + pass.first * all.down.columns * item_bytes; }
  const void* bias_of(const Pass& pass, const void* biases, const Layout& layout) const {
    return biases ? static_cast<const uint8_t*>(biases) + pass.expert * layout.rows * item_bytes : nullptr;
  }

  void multiply_gate_up() {
    thread_local Scratch scratch;
    int64_t packed = -1;
    GemmArgs args{};
    args.layout = all.gate_up;
    args.act_dtype = all.act_dtype;
    args.x = all.x;
    args.x_stride = all.x_stride;
    args.x_scales = all.x_scales;
    args.activation = &all.activation;
    args.y_stride = all.down.columns;
    for (int64_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < static_cast<int64_t>(items.size());) {
      const Item& item = items[i];
      const Pass& pass = passes[item.pass];
      args.packed = all.gate_up_packed + pass.expert * args.layout.bytes();
      args.bias = bias_of(pass, all.gate_up_bias, args.layout);
      args.tokens = pass.tokens;
      args.x_rows = rows.data() + pass.first;
      args.y = intermediate_of(pass);
      if (packed != item.pass) {
        const TokenBlocks blocks = blocks_of(pass);
        args.panel = scratch.bytes(blocks.capacity() * pass.kernel->panel_bytes(args.layout));
        pass.kernel->pack_tokens(args, 0, blocks.count);
        packed = item.pass;
      }
      pass.kernel->multiply_tiles(args, item.begin, item.end);
      if (pieces_left[item.pass].fetch_sub(1, std::memory_order_acq_rel) == 1) pack_intermediate(pass);
    }
  }
  void pack_intermediate(const Pass& pass) const {
    uint8_t* values = intermediate_of(pass);
    const int64_t strips = all.gate_up.strips() / (all.activation.gated ? 2 : 1), written = strips * kStripRows;
    if (written < all.down.columns)
      for (int64_t t = 0; t < pass.tokens; ++t)
        std::memset(values + (t * all.down.columns + written) * item_bytes, 0,
                    (all.down.columns - written) * item_bytes);
    GemmArgs args{};
    args.layout = all.down;
    args.act_dtype = all.act_dtype;
    args.x = values;
    args.x_stride = all.down.columns;
    args.tokens = pass.tokens;
    args.panel = panels + pass.panel;
    pass.kernel->pack_tokens(args, 0, blocks_of(pass).count);
  }

  void multiply_down() {
    thread_local Scratch scratch;
    const int64_t stride = down_tiles * kTileRows, tiles = all.down.tiles(), count = ceil_div(tiles, down_tiles);
    const int64_t bytes = tokens * stride * static_cast<int64_t>(sizeof(float));
    float* combined = reinterpret_cast<float*>(scratch.bytes(bytes));
    GemmArgs args{};
    args.layout = all.down;
    args.act_dtype = all.act_dtype;
    args.combined = combined;
    args.combined_stride = stride;
    for (int64_t i; (i = next_down.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const int64_t begin = i * down_tiles, end = std::min(begin + down_tiles, tiles);
      args.combined_begin = begin * kTileRows;
      std::memset(combined, 0, bytes);
      for (const Pass& pass : passes) {
        args.packed = all.down_packed + pass.expert * args.layout.bytes();
        args.bias = bias_of(pass, all.down_bias, args.layout);
        args.tokens = pass.tokens;
        args.panel = panels + pass.panel;
        args.combined_rows = rows.data() + pass.first;
        args.weights = weights.data() + pass.first;
        pass.kernel->multiply_tiles(args, begin, end);
      }
      const int64_t columns = std::min(stride, all.hidden - args.combined_begin);
      for (int64_t t = 0; t < tokens; ++t)
        kernels.by_rows.round(all.act_dtype, combined + t * stride,
                              static_cast<uint8_t*>(all.y) + (t * all.hidden + args.combined_begin) * item_bytes,
                              columns);
    }
  }
};

// A round's tokens as every expert reads them: with their channels in the order of the weight's columns, zeros after
// them, and rounded to int8 if the kernels do that. Each expert by itself would take its channels from all over a
// token, and round them once more.
struct Preparation {
  const ExpertsArgs& args;
  const Int8Kernels* rounding;  // null: tokens are not rounded
  uint8_t* to = nullptr;        // [tokens, columns of gate and up], int8 or as x
  float* scales = nullptr;      // [tokens], if they are rounded

  bool reorders() const { return args.permutation || args.hidden < args.gate_up.columns; }
  int64_t row_bytes() const { return args.gate_up.columns * (rounding ? 1 : bits(args.act_dtype) / 8); }

  template <class Bits>
  void copy(const Bits* from, Bits* row) const {
    if (args.permutation)
      for (int64_t c = 0; c < args.hidden; ++c) row[c] = from[args.permutation[c]];
    else
      std::memcpy(row, from, args.hidden * sizeof(Bits));
    std::memset(row + args.hidden, 0, (args.gate_up.columns - args.hidden) * sizeof(Bits));
  }
  void copy(const uint8_t* from, uint8_t* row) const {
    if (bits(args.act_dtype) == 16)
      copy(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(row));
    else
      copy(reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(row));
  }
  void prepare(int64_t begin, int64_t end) const {
    const int64_t columns = args.gate_up.columns, item = bits(args.act_dtype) / 8;
    thread_local Scratch scratch;
    uint8_t* copied = rounding && reorders() ? scratch.bytes(columns * item) : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* from = static_cast<const uint8_t*>(args.x) + t * args.x_stride * item;
      uint8_t* row = to + t * row_bytes();
      if (reorders()) copy(from, rounding ? copied : row);
      if (rounding) scales[t] = rounding->quantize(args.act_dtype, reorders() ? copied : from, columns, row);
    }
  }
};

// The same tokens, prepared.
ExpertsArgs prepared(const ExpertsArgs& args, const InstructionSet& set) {
  thread_local Scratch tokens, scales;
  Preparation preparation{args, args.gate_up.int8_activations ? set.int8_activations : nullptr};
  if (!preparation.reorders() && !preparation.rounding) return args;
  preparation.to = tokens.bytes(args.tokens * preparation.row_bytes());
  if (preparation.rounding)
    preparation.scales = reinterpret_cast<float*>(scales.bytes(args.tokens * static_cast<int64_t>(sizeof(float))));
  parallel_for(
      args.tokens, ceil_div(kCopyGrain, args.hidden),
      [](int64_t begin, int64_t end, void* self) { static_cast<Preparation*>(self)->prepare(begin, end); },
      &preparation);
  ExpertsArgs changed = args;
  changed.x = preparation.to;
  changed.x_stride = args.gate_up.columns;
  changed.x_scales = preparation.scales;
  changed.permutation = nullptr;
  return changed;
}

}  // namespace

void experts(const ExpertsArgs& all, const InstructionSet& set) {
  const int64_t item_bytes = bits(all.act_dtype) / 8;
  const int64_t round_tokens = ceil_div(all.tokens, ceil_div(all.tokens, kRoundTokens));
  for (int64_t first = 0; first < all.tokens; first += round_tokens) {
    ExpertsArgs args = all;
    args.tokens = std::min(round_tokens, all.tokens - first);
    args.x = static_cast<const uint8_t*>(all.x) + first * all.x_stride * item_bytes;
    args.y = static_cast<uint8_t*>(all.y) + first * all.hidden * item_bytes;
    args.ids = all.ids + first * all.top_k;
    args.weights = all.weights + first * all.top_k;
    const ExpertsArgs ready = prepared(args, set);
    Round round(ready, set);
    parallel_for(
        threads(), 1, [](int64_t, int64_t, void* round) { static_cast<Round*>(round)->multiply_gate_up(); }, &round);
    parallel_for(
        threads(), 1, [](int64_t, int64_t, void* round) { static_cast<Round*>(round)->multiply_down(); }, &round);
  }
}

}  // namespace ria
