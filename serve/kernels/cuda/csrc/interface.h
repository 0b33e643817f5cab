// What a compiled tile promises the library, and the C functions the library promises Python.
//
// Every function takes plain pointers and numbers: no torch, no Python, so one binary serves all their versions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define RIA_API extern "C" __attribute__((visibility("default")))

namespace ria {

// Of x, W and y; e4m3 x and W make a bf16 or fp16 y. The bias has y's.
enum DataType : int { kBFloat16 = 0, kFloat16 = 1, kFloat8ToBFloat16 = 2, kFloat8ToFloat16 = 3 };

constexpr bool is_float8(int data_type) { return data_type == kFloat8ToBFloat16 || data_type == kFloat8ToFloat16; }

enum Result : int { kOk = 0, kBadArgument = 1, kCannotRun = 2, kWorkspaceTooSmall = 3, kCudaError = 4 };

// How a tile may divide K among thread blocks.
enum Split : int { kSplitForced = -1, kSplitHeuristic = 0, kSplitNone = 1 };  // 2 and more: that many parts

// y[tokens, out] = x[tokens, in] @ W[out, in]^T + bias[out], all rows contiguous. With e4m3 operands the sums are
// multiplied by token_scales[token] * weight_scales[out] before the bias is added.
struct Problem {
  int data_type;
  int out_features;
  int in_features;
  int tokens;
  int split;
  int multiprocessors;
  int device;
  void const* x;
  void const* values;         // [out, in/2], the two kept values of each group of four in column order
  void const* metadata;       // in the layout of metadata.h for the width of the values
  void const* weight_scales;  // float [out], with e4m3 operands only
  void const* token_scales;   // float [tokens], likewise
  void const* bias;           // [out] or null
  void* y;
  void* workspace;
  size_t workspace_bytes;
  void* stream;
};

// One compiled tile shape. `accepts` and `workspace_bytes` touch no device.
struct Tile {
  char const* name;
  bool (*accepts)(Problem const&);
  size_t (*workspace_bytes)(Problem const&);
  Result (*run)(Problem const&);
};

// Each tile's object file adds itself when the library is loaded.
bool add_tile(Tile const&);

// kCudaError, and what ria_error() says of it: a string that lasts.
Result cuda_error(char const* what);

// kOk, or the same with CUDA's own words.
Result result_of(cudaError_t error);

// The first bytes of every workspace belong to the 2.x tiles' counters, which must be zero before the first launch and
// are zero again after each.
constexpr size_t kCounterBytes = 64 * 1024;

}  // namespace ria
