// The interface between the driver (linear.cpp) and the kernels of each instruction set.
#pragma once
#include "layout.h"

namespace ria {

// The most tokens of a pass: their accumulators for one tile stay in cache.
constexpr int64_t kMaxPassTokens = 192;

// y[tokens, rows] = x[tokens, columns][:, permutation] @ W^T + bias, for the tokens of one pass.
struct GemmArgs {
  Layout layout;
  const uint8_t* packed;       // the packed weight, header first
  const void* x;               // first token of the pass; the channels of a token are contiguous
  int64_t x_stride;            // elements between tokens
  const int32_t* permutation;  // [columns], already checked; null for the identity
  const void* bias;            // [rows] or null
  void* y;                     // first token of the pass, [tokens, rows] contiguous
  int64_t tokens;              // at most kMaxPassTokens
  uint8_t* panel;              // the tokens' activations, packed in the order in which the kernel reads them
};

// One way to multiply weights of one dtype on one instruction set.
struct Kernel {
  int64_t block_tokens;      // most tokens in a token block: as many as the registers hold
  int64_t step;              // token blocks start at multiples of this
  int64_t pass_step;         // passes start at multiples of this, if there are several
  int64_t activation_bytes;  // per token and group, in the panel
  void (*pack_tokens)(const GemmArgs&, int64_t begin, int64_t end);     // [begin, end) of the token blocks
  void (*multiply_tiles)(const GemmArgs&, int64_t begin, int64_t end);  // [begin, end) of the tiles
};

// Vectors over rows (gemm_rows.h) and over tokens (gemm_tokens.h). Both give the same bits.
struct Kernels {
  Kernel by_rows;
  int64_t min_tokens = INT64_MAX;  // `by_tokens` is faster from this many on
  Kernel by_tokens = {};

  const Kernel& fastest(int64_t tokens) const { return tokens < min_tokens ? by_rows : by_tokens; }
};

struct InstructionSet {
  const char* name;
  Kernels kernels[kNumDtypes];
};

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const Kernels kAvx512Bf16, kAvx512Int8;  // the other dtypes use kAvx512
#endif

// Divides the tokens of a pass into blocks of nearly equal size, in whole steps: `remainder` blocks of `small + 1`
// steps, then blocks of `small` steps. Only the last step may be partly filled.
struct TokenBlocks {
  int64_t tokens, step, count, small, remainder;
  TokenBlocks(int64_t tokens, int64_t max_tokens, int64_t step = 1) : tokens(tokens), step(step) {
    const int64_t steps = (tokens + step - 1) / step;
    count = (steps * step + max_tokens - 1) / max_tokens;
    small = steps / count;
    remainder = steps % count;
  }
  int64_t first(int64_t block) const { return (block * small + (block < remainder ? block : remainder)) * step; }
  int64_t padded_size(int64_t block) const { return (small + (block < remainder)) * step; }
  int64_t size(int64_t block) const {
    const int64_t left = tokens - first(block), full = padded_size(block);
    return left < full ? left : full;
  }
  int64_t max_size() const { return padded_size(0); }
  int64_t capacity() const {
    return count * max_size();
  }  // tokens that a panel has space for; never shrinks as tokens grow
};

// The best instruction set of this machine, or the one that RIA_VLLM_CPU_ISA names. Throws std::runtime_error if the
// machine lacks it.
const InstructionSet& instruction_set();

// Throws std::runtime_error, with the row and the columns, if a group does not keep exactly two values.
// `scales`: [rows] if the dtype has scales, else null.
void pack(const Layout&, const void* values, const uint8_t* bitmask, const float* scales, uint8_t* packed);

// y for any number of tokens. `args` points at the first token; its `tokens` and `panel` are set here.
void linear(GemmArgs args, int64_t tokens, const InstructionSet&);

// The number of threads that parallel_for uses.
int64_t threads();

// Runs body(begin, end, context) over parts of [0, count) on torch's threads.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace ria
