// Passes over the tokens, and threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace ria {
namespace {

// Activations of one pass, which all tiles read over and over: what an L2 cache holds beside the weights' stream.
constexpr int64_t kPassBytes = 640 << 10;
// Tokens below which a pass is not made smaller still, because every pass reads all weights.
constexpr int64_t kMinPassTokens = 96;
// Activations of all passes that are packed together. More tokens than that go in several rounds.
constexpr int64_t kPanelBytes = 16 << 20;
// Activations that a thread copies in some 10 microseconds: up to so many, every thread copies all of them for itself,
// which takes less than to meet and to fetch what another core copied.
constexpr int64_t kPackGrain = 32 << 10;
// A matrix that fits the L2 cache of every core. Its threads share the tokens and not the rows: each reads the whole
// matrix, and nothing that another core wrote.
constexpr int64_t kSmallBytes = 1 << 20;
// How often a thread comes back for more tiles of a pass.
constexpr int64_t kTurnsPerThread = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Activations of the calling thread's current pass or round. Grows to the largest seen and stays.
uint8_t* panel(int64_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> buffer;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    buffer.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    capacity = bytes;
  }
  return buffer.get();
}

// Passes over some tokens. Either all are packed first into one panel for all threads, and then multiplied; or
// (all.panel null) every thread packs the pass it works on for itself. Threads wait for each other nowhere else. They
// take tiles by turns: one that the system holds up, because the machine has other things to do, holds up the product
// by a few tiles and not by half of it.
struct Round {
  Product all;  // the tokens of all passes
  const Kernel& kernel;
  int64_t pass_tokens;
  int64_t turn_tiles;
  std::atomic<int64_t> next_turn{0};

  int64_t token_bytes() const { return all.layout.groups() * kernel.activation_bytes; }
  int64_t passes() const { return divide_up(all.tokens, pass_tokens); }
  int64_t turns() const { return divide_up(all.layout.tiles(), turn_tiles); }  // of a pass
  TokenBlocks blocks_of(int64_t tokens) const { return {tokens, kernel.block_tokens, kernel.step}; }
  int64_t blocks() const { return blocks_of(pass_tokens).count; }                       // of a full pass
  int64_t pass_bytes() const { return blocks_of(pass_tokens).room() * token_bytes(); }  // in the panel

  Product pass(int64_t i) const {
    const int64_t first = i * pass_tokens, left = all.tokens - first, item = activation_size(all.layout.dtype);
    Product product = all;
    product.tokens = left < pass_tokens ? left : pass_tokens;
    product.x = static_cast<const uint8_t*>(all.x) + first * all.x_stride * item;
    product.y = static_cast<uint8_t*>(all.y) + first * all.layout.rows * item;
    if (all.panel) product.panel += i * pass_bytes();
    return product;
  }
  void pack(int64_t begin, int64_t end) const {  // token blocks, counted over all passes
    for (int64_t i = begin; i < end; ++i) {
      const Product product = pass(i / blocks());
      const int64_t block = i % blocks();
      if (block < blocks_of(product.tokens).count) kernel.pack_tokens(product, block, block + 1);
    }
  }
  void multiply() {
    const int64_t tiles = all.layout.tiles(), all_turns = passes() * turns();
    uint8_t* own = all.panel ? nullptr : panel(pass_bytes());
    int64_t packed = -1;
    for (int64_t i; (i = next_turn.fetch_add(1, std::memory_order_relaxed)) < all_turns;) {
      Product product = pass(i / turns());
      if (own) {
        product.panel = own;
        if (packed != i / turns()) kernel.pack_tokens(product, 0, blocks_of(product.tokens).count);
        packed = i / turns();
      }
      const int64_t tile = i % turns() * turn_tiles, end = tile + turn_tiles;
      kernel.multiply_tiles(product, tile, end < tiles ? end : tiles);
    }
  }
};

// Tokens of the largest pass.
int64_t most_pass_tokens(int64_t token_bytes, int64_t block_tokens) {
  const int64_t tokens = std::clamp(kPassBytes / token_bytes, kMinPassTokens, kMaxPassTokens);
  return std::max(tokens / block_tokens, int64_t{1}) * block_tokens;
}

}  // namespace

void linear(Product product, int64_t tokens, const InstructionSet& set) {
  const Layout& layout = product.layout;
  const bool small = threads() > 1 && layout.bytes() <= kSmallBytes, copied = tokens * layout.columns <= kPackGrain;
  const Kernel& kernel =
      set.kernels[static_cast<int>(layout.dtype)].fastest(small && !copied ? divide_up(tokens, threads()) : tokens);
  const int64_t item = activation_size(layout.dtype), token_bytes = layout.groups() * kernel.activation_bytes;
  const int64_t most = most_pass_tokens(token_bytes, kernel.block_tokens);
  const int64_t turn_tiles = std::max<int64_t>(layout.tiles() / (threads() * kTurnsPerThread), 1);
  const auto multiply = [](int64_t, int64_t, void* round) { static_cast<Round*>(round)->multiply(); };

  const bool few = copied && tokens <= most;
  if (few || small) {
    product.tokens = tokens;
    product.panel = nullptr;
    const int64_t passes = few ? 1 : divide_up(tokens, threads() * most) * threads();
    const int64_t pass_tokens = divide_up(divide_up(tokens, passes), kernel.step) * kernel.step;
    Round round{product, kernel, pass_tokens, few ? turn_tiles : layout.tiles()};
    parallel_for(threads(), 1, multiply, &round);
    return;
  }
  const int64_t round_passes = std::max<int64_t>(kPanelBytes / (token_bytes * most), 1);
  while (tokens > 0) {
    product.tokens = std::min(tokens, round_passes * most);
    // Passes as equal as can be, in whole steps.
    const int64_t equal = divide_up(product.tokens, divide_up(product.tokens, most));
    Round round{product, kernel, divide_up(equal, kernel.pass_step) * kernel.pass_step, turn_tiles};
    round.all.panel = panel(round.passes() * round.pass_bytes());
    parallel_for(
        round.passes() * round.blocks(), divide_up(kPackGrain, kernel.block_tokens * layout.columns),
        [](int64_t begin, int64_t end, void* round) { static_cast<Round*>(round)->pack(begin, end); }, &round);
    parallel_for(threads(), 1, multiply, &round);
    product.x = static_cast<const uint8_t*>(product.x) + product.tokens * product.x_stride * item;
    product.y = static_cast<uint8_t*>(product.y) + product.tokens * layout.rows * item;
    tokens -= product.tokens;
  }
}

}  // namespace ria
