// Passes over the tokens, and threads.
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

struct Work {
  const Product* product;
  const Kernel* kernel;
};

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
  const int64_t passes = (tokens + most - 1) / most;
  pass.panel = panel((tokens < most ? tokens : most) * layout.columns * static_cast<int64_t>(sizeof(float)));
  Work work{&pass, &kernel};
  for (int64_t i = 0; i < passes; ++i) {
    // Passes as equal as can be, in whole token blocks.
    const int64_t left = tokens, passes_left = passes - i;
    int64_t size = (left + passes_left - 1) / passes_left;
    size = (size + kernel.block_tokens - 1) / kernel.block_tokens * kernel.block_tokens;
    pass.tokens = size < left ? size : left;
    const int64_t blocks = TokenBlocks(pass.tokens, kernel.block_tokens).count;
    const int64_t block_activations = (pass.tokens / blocks) * layout.columns;
    parallel_for(
        blocks, (kPackGrain + block_activations - 1) / block_activations,
        [](int64_t begin, int64_t end, void* context) {
          const Work& work = *static_cast<Work*>(context);
          work.kernel->pack_tokens(*work.product, begin, end);
        },
        &work);
    parallel_for(
        layout.tiles(), 1,
        [](int64_t begin, int64_t end, void* context) {
          const Work& work = *static_cast<Work*>(context);
          work.kernel->multiply_tiles(*work.product, begin, end);
        },
        &work);
    pass.x = static_cast<const uint8_t*>(pass.x) + pass.tokens * pass.x_stride * item;
    pass.y = static_cast<uint8_t*>(pass.y) + pass.tokens * layout.rows * item;
    tokens -= pass.tokens;
    if (tokens == 0) break;
  }
}

}  // namespace ria
