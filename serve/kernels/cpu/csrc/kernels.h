// What each instruction set provides, and the job it is given.
#pragma once
#include "layout.h"

namespace ria {

// Tokens whose results one tile keeps in cache.
constexpr int64_t kMaxPassTokens = 192;

// y[tokens, rows] = x[tokens, columns][:, permutation] @ W^T + bias for the tokens of one pass.
struct Product {
  Layout layout;
  const uint8_t* packed;       // starting with the header
  const void* x;               // first token of the pass, last dimension contiguous
  int64_t x_stride;            // elements from token to token
  const int32_t* permutation;  // [columns], checked; null: the order in which x comes
  const void* bias;            // [rows] or null
  void* y;                     // first token of the pass, [tokens, rows] contiguous
  int64_t tokens;              // at most kMaxPassTokens
  uint8_t* panel;              // the tokens' activations as the kernel reads them
};

// One way to multiply weights of one dtype on one instruction set.
struct Kernel {
  int64_t block_tokens;      // most tokens of a token block: what the registers hold
  int64_t step;              // token blocks begin at multiples of so many tokens,
  int64_t pass_step;         // and passes, where there are several, at multiples of so many
  int64_t activation_bytes;  // of one token and group in the panel
  void (*pack_tokens)(const Product&, int64_t begin, int64_t end);     // of token blocks
  void (*multiply_tiles)(const Product&, int64_t begin, int64_t end);  // of tiles
};

// Both give the same bits.
struct Kernels {
  Kernel few;
  int64_t many_tokens = INT64_MAX;  // from so many on, `many` is the faster one
  Kernel many = {};

  const Kernel& fastest(int64_t tokens) const { return tokens < many_tokens ? few : many; }
};

struct InstructionSet {
  const char* name;
  Kernels kernels[kDtypes];
};

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const Kernels kAvx512Bf16, kAvx512Int8;  // the other dtypes use kAvx512
#endif

// Token blocks of a pass are as equal as can be, in whole steps: `remainder` blocks of `small + 1` steps, then blocks
// of `small`. Only the last step may be one that tokens do not fill.
struct TokenBlocks {
  int64_t tokens, step, count, small, remainder;
  TokenBlocks(int64_t tokens, int64_t most, int64_t step = 1) : tokens(tokens), step(step) {
    const int64_t steps = (tokens + step - 1) / step;
    count = (steps * step + most - 1) / most;
    small = steps / count;
    remainder = steps % count;
  }
  int64_t first(int64_t block) const { return (block * small + (block < remainder ? block : remainder)) * step; }
  int64_t padded(int64_t block) const { return (small + (block < remainder)) * step; }
  int64_t size(int64_t block) const {
    const int64_t left = tokens - first(block), full = padded(block);
    return left < full ? left : full;
  }
  int64_t most() const { return padded(0); }
  int64_t room() const { return count * most(); }  // tokens for which a panel has space; grows with the tokens
};

// The best set this machine has, or the one RIA_VLLM_CPU_ISA names. Throws std::runtime_error for one it lacks.
const InstructionSet& instruction_set();

// Throws std::runtime_error naming row and columns if a group has not exactly two kept values.
// `scales`: [rows] where the dtype is scaled, else null.
void pack(const Layout&, const void* values, const uint8_t* bitmask, const float* scales, uint8_t* packed);

// The product for any number of tokens; `product` describes the first of them, its `tokens` and `panel` are set here.
void linear(Product product, int64_t tokens, const InstructionSet&);

// How many threads parallel_for may use.
int64_t threads();

// Runs body(context, begin, end) over pieces of [0, count) on torch's threads.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace ria
