// The driver: divides the tokens into passes and the work among threads.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "scratch.h"

namespace ria {
namespace {

// Bytes of packed activations in a pass. Every tile reads all of them, so they must fit the L2 cache beside the stream
// of weights.
constexpr int64_t kPassBytes = 640 << 10;
// Bytes of packed activations in a round, over all its passes. More tokens take several rounds.
constexpr int64_t kPanelBytes = 16 << 20;
// Activations that a thread copies in about 10 microseconds. Up to this many, every thread copies all of them for
// itself: that takes less time than a barrier and fetching what another core copied.
constexpr int64_t kPackGrain = 32 << 10;
// A matrix of this size fits the L2 cache of every core. Its threads divide the tokens, not the rows: each reads the
// whole matrix and nothing that another core wrote.
constexpr int64_t kSmallBytes = 1 << 20;
// Work items per thread and pass. Several, so that a thread that the system delays leaves its share to the others.
constexpr int64_t kItemsPerThread = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The calling thread's buffer for packed activations.
uint8_t* panel(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.bytes(bytes);
}

// Some passes that run together. Either all tokens are packed into one shared panel first and then multiplied, or
// (all.panel null) every thread packs the pass that it works on for itself. Threads wait for each other nowhere else.
// They take work items, a few tiles of a pass each, from a common counter: a thread that the system delays then delays
// the result by a few tiles, not by half of the matrix.
struct Round {
  GemmArgs all;  // the tokens of all passes
  const Kernel& kernel;
  int64_t pass_tokens;
  int64_t tiles_per_item;
  std::atomic<int64_t> next_item{0};

  int64_t passes() const { return ceil_div(all.tokens, pass_tokens); }
  int64_t items_per_pass() const { return ceil_div(all.layout.tiles(), tiles_per_item); }
  TokenBlocks blocks_of(int64_t tokens) const { return {tokens, kernel.block_tokens, kernel.step}; }
  int64_t blocks() const { return blocks_of(pass_tokens).count; }  // of a full pass
  int64_t pass_bytes() const {                                     // in the panel, in whole cache lines
    return ceil_div(blocks_of(pass_tokens).capacity() * kernel.panel_bytes(all.layout), 64) * 64;
  }

  GemmArgs pass(int64_t i) const {
    const int64_t first = i * pass_tokens, left = all.tokens - first, item_bytes = bits(all.act_dtype) / 8;
    GemmArgs args = all;
    args.tokens = left < pass_tokens ? left : pass_tokens;
    args.x = static_cast<const uint8_t*>(all.x) + first * all.x_stride * item_bytes;
    args.y = static_cast<uint8_t*>(all.y) + first * all.layout.rows * item_bytes;
    if (all.panel) args.panel += i * pass_bytes();
    return args;
  }
  void pack(int64_t begin, int64_t end) const {  // token blocks, counted over all passes
    for (int64_t i = begin; i < end; ++i) {
      const GemmArgs args = pass(i / blocks());
      const int64_t block = i % blocks();
      if (block < blocks_of(args.tokens).count) kernel.pack_tokens(args, block, block + 1);
    }
  }
  void multiply() {
    const int64_t tiles = all.layout.tiles(), all_items = passes() * items_per_pass();
    uint8_t* own = all.panel ? nullptr : panel(pass_bytes());
    int64_t packed = -1;
    for (int64_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < all_items;) {
      GemmArgs args = pass(i / items_per_pass());
      if (own) {
        args.panel = own;
        if (packed != i / items_per_pass()) kernel.pack_tokens(args, 0, blocks_of(args.tokens).count);
        packed = i / items_per_pass();
      }
      const int64_t tile = i % items_per_pass() * tiles_per_item, end = tile + tiles_per_item;
      kernel.multiply_tiles(args, tile, end < tiles ? end : tiles);
    }
  }
};

}  // namespace

uint8_t* quantized_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.bytes(bytes);
}

int64_t max_pass_tokens(int64_t token_bytes, const Kernel& kernel) {
  const int64_t tokens = std::clamp(kPassBytes / token_bytes, kernel.min_pass_tokens, kMaxPassTokens);
  return std::max(tokens / kernel.block_tokens, int64_t{1}) * kernel.block_tokens;
}

void linear(GemmArgs args, int64_t tokens, const InstructionSet& set) {
  const Layout& layout = args.layout;
  const bool small = threads() > 1 && layout.bytes() <= kSmallBytes;
  const bool copy_is_cheap = tokens * layout.columns <= kPackGrain;
  const Kernel& kernel =
      set.kernels_for(layout, args.act_dtype).fastest(small && !copy_is_cheap ? ceil_div(tokens, threads()) : tokens);
  const int64_t item_bytes = bits(args.act_dtype) / 8;
  const int64_t token_bytes = kernel.panel_bytes(layout);
  const int64_t max_tokens = max_pass_tokens(token_bytes, kernel);
  const int64_t tiles_per_item = std::max<int64_t>(layout.tiles() / (threads() * kItemsPerThread), 1);
  const auto multiply = [](int64_t, int64_t, void* round) { static_cast<Round*>(round)->multiply(); };

  const bool one_pass = copy_is_cheap && tokens <= max_tokens;
  if (one_pass || small) {
    args.tokens = tokens;
    args.panel = nullptr;
    const int64_t passes = one_pass ? 1 : ceil_div(tokens, threads() * max_tokens) * threads();
    const int64_t pass_tokens = ceil_div(ceil_div(tokens, passes), kernel.step) * kernel.step;
    Round round{args, kernel, pass_tokens, one_pass ? tiles_per_item : layout.tiles()};
    parallel_for(threads(), 1, multiply, &round);
    return;
  }
  const int64_t round_passes = std::max<int64_t>(kPanelBytes / (token_bytes * max_tokens), 1);
  while (tokens > 0) {
    args.tokens = std::min(tokens, round_passes * max_tokens);
    // Passes of nearly equal size, in whole steps.
    const int64_t equal = ceil_div(args.tokens, ceil_div(args.tokens, max_tokens));
    Round round{args, kernel, ceil_div(equal, kernel.pass_step) * kernel.pass_step, tiles_per_item};
    round.all.panel = panel(round.passes() * round.pass_bytes());
    parallel_for(
        round.passes() * round.blocks(), ceil_div(kPackGrain, kernel.block_tokens * layout.columns),
        [](int64_t begin, int64_t end, void* round) { static_cast<Round*>(round)->pack(begin, end); }, &round);
    parallel_for(threads(), 1, multiply, &round);
    args.x = static_cast<const uint8_t*>(args.x) + args.tokens * args.x_stride * item_bytes;
    args.y = static_cast<uint8_t*>(args.y) + args.tokens * layout.rows * item_bytes;
    tokens -= args.tokens;
  }
}

}  // namespace ria
