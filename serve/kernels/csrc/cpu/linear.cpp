// Passes over the tokens, and threads.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace ria {
namespace {

// Activations of one pass that all tiles read over and over: what an L2 cache holds beside the weights' stream.
constexpr int64_t kPanelBytes = 640 << 10;
// Tokens below which a pass is not made smaller still, because every pass reads all weights.
constexpr int64_t kMinPassTokens = 96;
// Activations that one thread copies sooner than a second one wakes up.
constexpr int64_t kPackGrain = 16384;
// How often a thread comes back for more tiles.
constexpr int64_t kTurnsPerThread = 8;

struct Work {
  const Product* product;
  const Kernel* kernel;
  int64_t turn = 1;  // tiles that a thread takes at a time
  std::atomic<int64_t> next_tile{0};
};

void pack_pass(const Work& work) {
  const Product& product = *work.product;
  const int64_t blocks = TokenBlocks(product.tokens, work.kernel->block_tokens).count;
  const int64_t block_activations = product.tokens / blocks * product.layout.columns;
  parallel_for(
      blocks, (kPackGrain + block_activations - 1) / block_activations,
      [](int64_t begin, int64_t end, void* context) {
        const Work& work = *static_cast<const Work*>(context);
        work.kernel->pack_tokens(*work.product, begin, end);
      },
      const_cast<Work*>(&work));
}

// Each thread takes the next tiles when it has finished its last ones: a thread that the system holds up, because the
// machine has other things to do, holds up the product by a few tiles and not by half of it.
void multiply_pass(Work& work) {
  const int64_t workers = threads(), least = work.product->layout.tiles() / (workers * kTurnsPerThread);
  work.turn = least > 1 ? least : 1;
  parallel_for(
      workers, 1,
      [](int64_t, int64_t, void* context) {
        Work& work = *static_cast<Work*>(context);
        const int64_t tiles = work.product->layout.tiles(), turn = work.turn;
        for (int64_t tile; (tile = work.next_tile.fetch_add(turn, std::memory_order_relaxed)) < tiles;)
          work.kernel->multiply_tiles(*work.product, tile, tile + turn < tiles ? tile + turn : tiles);
      },
      &work);
}

// Activations of the calling thread's current pass. Grows to the largest pass seen and stays.
uint8_t* panel(int64_t bytes) {
  struct Free { void operator()(uint8_t* p) const { std::free(p); } };
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

int64_t pass_tokens(int64_t columns, int64_t activation_bytes, int64_t block_tokens) {
  int64_t tokens = kPanelBytes / (columns * activation_bytes);
  tokens = tokens < kMinPassTokens ? kMinPassTokens : tokens > kMaxPassTokens ? kMaxPassTokens : tokens;
  return tokens / block_tokens * block_tokens;
}

}  // namespace

void linear(Product pass, int64_t tokens, const InstructionSet& set) {
  const Layout& layout = pass.layout;
  const Kernel& kernel = set.kernels[static_cast<int>(layout.dtype)];
  const int64_t item = item_size(layout.dtype);
  const int64_t most = pass_tokens(layout.columns, item, kernel.block_tokens);
  int64_t passes = (tokens + most - 1) / most;
  pass.panel = panel((tokens < most ? tokens : most) * layout.columns * static_cast<int64_t>(sizeof(float)));
  for (; tokens > 0; --passes) {
    // Passes as equal as can be, in whole token blocks.
    const int64_t equal = (tokens + passes - 1) / passes;
    const int64_t whole = (equal + kernel.block_tokens - 1) / kernel.block_tokens * kernel.block_tokens;
    pass.tokens = whole < tokens ? whole : tokens;
    Work work{&pass, &kernel};
    pack_pass(work);
    multiply_pass(work);
    pass.x = static_cast<const uint8_t*>(pass.x) + pass.tokens * pass.x_stride * item;
    pass.y = static_cast<uint8_t*>(pass.y) + pass.tokens * layout.rows * item;
    tokens -= pass.tokens;
  }
}

}  // namespace ria
