// The interface between the drivers (linear.cpp, experts.cpp) and the kernels of each instruction set.
#pragma once
#include "layout.h"

namespace ria {

// The most tokens of a pass: their accumulators for one tile stay in cache.
constexpr int64_t kMaxPassTokens = 192;

// What an expert computes between its products; ria_vllm.serve.kernels.base.Activation describes it. With a gate, the
// strips of the first product's rows are, in turn, 16 gates and their 16 ups.
struct Activation {
  enum Kind : int64_t { silu, gelu, gelu_tanh, relu2, swiglustep, kKinds };
  Kind kind;
  bool gated;
  float alpha, beta, limit;
};

// y[tokens, rows] = x[tokens, columns][:, permutation] @ W^T + bias, for the tokens of one pass. The products of
// experts read tokens from anywhere in x, and do something else with the sums.
struct GemmArgs {
  Layout layout;
  const uint8_t* packed;       // the packed weight, header first
  const void* x;               // first token of the pass; the channels of a token are contiguous
  int64_t x_stride;            // elements between tokens
  const int32_t* permutation;  // [columns], already checked; null for the identity
  const void* bias;            // [rows] or null
  void* y;                     // first token of the pass, [tokens, rows] contiguous
  int64_t tokens;              // at most kMaxPassTokens
  Dtype act_dtype;             // of x, bias and y; as float weights say; any with int8 and int4 weights
  uint8_t* panel;              // the tokens' activations, packed in the order in which the kernel reads them

  const int32_t* x_rows;         // [tokens], where each token is in x, if it has no permutation; null: in order
  const float* x_scales;         // not null: x is rounded already, to int8 with these scales, one for each row of x
  const Activation* activation;  // not null: y gets the activations, each token y_stride elements after the last one
  int64_t y_stride;
  float* combined;          // not null: the sums, times [tokens] `weights`, are added to rows `combined_rows` of
  int64_t combined_stride;  // this matrix, whose first column belongs to the row `combined_begin` of W
  int64_t combined_begin;
  const int32_t* combined_rows;
  const float* weights;
};

// One way to multiply weights of one layout on one instruction set.
struct Kernel {
  int64_t block_tokens;      // most tokens in a token block: as many as the registers hold
  int64_t step;              // token blocks start at multiples of this
  int64_t pass_step;         // passes start at multiples of this, if there are several
  int64_t activation_bytes;  // per token and group, in the panel
  void (*pack_tokens)(const GemmArgs&, int64_t begin, int64_t end);     // [begin, end) of the token blocks
  void (*multiply_tiles)(const GemmArgs&, int64_t begin, int64_t end);  // [begin, end) of the tiles
  // To activations of experts, of `dtype`. `from` is on a cache line, in whole tiles of rows.
  void (*round)(Dtype dtype, const float* from, void* to, int64_t count);
  int64_t token_bytes = 0;  // per token in the panel, besides
  // A pass is not made smaller than this, because every pass reads all weights.
  int64_t min_pass_tokens = 96;

  // Of one token, in the panel.
  int64_t panel_bytes(const Layout& layout) const { return layout.groups() * activation_bytes + token_bytes; }
};

// Vectors over rows (gemm_rows.h) and over tokens (gemm_tokens.h). Both give the same bits.
struct Kernels {
  Kernel by_rows;
  int64_t min_tokens = INT64_MAX;  // `by_tokens` is faster from this many on
  Kernel by_tokens = {};

  const Kernel& fastest(int64_t tokens) const { return tokens < min_tokens ? by_rows : by_tokens; }
};

constexpr int64_t kGroupDigits = 16;

// y[tokens, rows] = x @ W^T + bias, where W is dense (gemm_dense.h).
struct DenseArgs {
  const int8_t* weights;  // [rows, columns]
  const float* scales;    // [rows]
  int64_t rows, columns, tokens;
  const int8_t* digits;       // [2 * tokens, columns], the two numbers of each channel
  const float* digit_scales;  // [2 * tokens]
  // Not null: the digits of each eight tokens, [columns / 4][kGroupDigits][4], and zeros after the last one.
  const int8_t* grouped_digits;
  const void* bias;  // [rows] or null
  Dtype act_dtype;   // of bias and y
  void* y;
};

// For activations that are rounded to int8 (gemm_int8.h).
struct Int8Products {  // for weights of one pattern
  Kernels int8, int4;
};
struct Int8Kernels {
  Int8Products of_4;
  const Int8Products* of_16;
  // Rounds the channels of a token, a multiple of 64, to int8 and returns its scale.
  float (*quantize)(Dtype dtype, const uint8_t* x, int64_t columns, uint8_t* to);
  void (*multiply_dense)(const DenseArgs&, int64_t begin, int64_t end);  // [begin, end) of the tiles of kTileRows rows
  int64_t min_grouped_tokens = INT64_MAX;                                // from this many on, it wants `grouped_digits`

  const Kernels& kernels_for(const Layout& layout) const {
    const Int8Products& products = layout.pattern == 4 ? of_4 : *of_16;
    return layout.dtype == Dtype::int8 ? products.int8 : products.int4;
  }
};

// For weights of one pattern and activations that are not rounded.
struct Products {
  Kernels kernels[kNumDtypes];  // weights of each dtype that have one scale per row, or none
  Kernels grouped[kNumDtypes];  // those that have scales for groups of columns: int8 and int4
};

struct InstructionSet {
  const char* name;
  Products of_4;
  const Products* of_16;
  const Int8Kernels* int8_activations;
  // Whose kernels multiply integer weights by float16 and float32 activations; null: these, which use fp32 lanes.
  const InstructionSet* fp32_lanes = nullptr;

  const Kernels& kernels_for(const Layout& layout, Dtype act_dtype) const {
    if (layout.int8_activations) return int8_activations->kernels_for(layout);
    const bool converts = fp32_lanes && has_scales(layout.dtype) && act_dtype != Dtype::bfloat16;
    const InstructionSet& set = converts ? *fp32_lanes : *this;
    const Products& products = layout.pattern == 4 ? set.of_4 : *set.of_16;
    return (layout.group_size ? products.grouped : products.kernels)[static_cast<int>(layout.dtype)];
  }
};

extern const InstructionSet kPortable;
extern const Products kPortableOf16;
extern const Int8Kernels kPortableInt8;
extern const Int8Products kPortableInt8Of16;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const Products kAvx2Of16, kAvx512Of16;
extern const Int8Kernels kAvx2Int8, kAvxVnniInt8, kAvx512VnniInt8, kAmxInt8Activations;
extern const Int8Products kAvx2Int8Of16, kAvxVnniOf16, kAvx512Vbmi2Of16, kAmxInt8Of16;
// With BF16; float16 and float32 weights use kAvx512, and so do these activations of integer weights.
extern const Products kAvx512Bf16, kAvx512Bf16Of16, kAmxBf16, kAmxBf16Of16;
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

struct GivenScales {
  const void* values;
  int64_t group_size;
  Dtype dtype;
};
// Throws std::runtime_error, with the row and the columns, if a group does not keep exactly half of its values.
// `values`: as in the checkpoint; int4 ones are two to a byte, as value + 8. `scales`: float32 [rows], or
// [rows, columns / group_size], if the dtype has scales, else null. `gates`: 0, or the rows of an expert's gate, which
// its up's follow: then layout.rows is `gated_rows(gates)`. Where the layout has multipliers, `scales` may be those of
// groups, too; it throws if they are not multiples, 1 to 15, of one number for each row.
void pack(const Layout&, const void* values, const uint8_t* bitmask, GivenScales, uint8_t* packed, int64_t gates = 0);

// Rows of a packed gate and up that have `gates` rows each: both in whole strips.
constexpr int64_t gated_rows(int64_t gates) { return (gates + kStripRows - 1) / kStripRows * 2 * kStripRows; }

// Asks for large pages. Every token reads the whole weight, so they save TLB misses, if the system grants them.
void ask_for_huge_pages(uint8_t* begin, int64_t bytes);

// The calling thread's buffer for tokens on their way into the panel.
uint8_t* quantized_scratch(int64_t bytes);

// y for any number of tokens. `args` points at the first token; its `tokens` and `panel` are set here.
void linear(GemmArgs args, int64_t tokens, const InstructionSet&);

// The same for a dense weight. x, with `x_stride` elements between tokens, is rounded here; the digits are set here.
void dense_linear(DenseArgs args, const void* x, int64_t x_stride, const InstructionSet&);

// y[tokens, hidden] = the sum over k of weights[., k] * down(activation(gate_up(x))) of the expert ids[., k].
struct ExpertsArgs {
  int64_t num_experts, tokens, top_k, hidden;
  Layout gate_up, down;                         // of each expert
  Dtype act_dtype;                              // of x, the biases and y
  const uint8_t *gate_up_packed, *down_packed;  // one expert after another
  const void *gate_up_bias, *down_bias;         // [experts, rows], or both null
  const void* x;                                // [tokens, hidden]; the channels of a token are contiguous
  int64_t x_stride;                             // elements between tokens
  const float* x_scales;                        // not null: as in GemmArgs
  const int32_t* permutation;                   // [hidden], already checked; null for the identity
  Activation activation;
  const int32_t* ids;    // [tokens, top_k], already checked; -1 for none
  const float* weights;  // [tokens, top_k]
  void* y;               // contiguous
};
void experts(const ExpertsArgs&, const InstructionSet&);

// The most tokens of a kernel's pass that packs `token_bytes` for each.
int64_t max_pass_tokens(int64_t token_bytes, const Kernel&);

// The number of threads that parallel_for uses.
int64_t threads();

// Runs body(begin, end, context) over parts of [0, count) on torch's threads.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace ria
