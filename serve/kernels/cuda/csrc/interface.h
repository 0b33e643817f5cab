// The interface between the tiles and the library, and the macro for the C functions that Python calls (library.cu).
//
// Those take plain pointers and numbers: no torch and no Python, so one binary serves every version of both.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define RIA_API extern "C" __attribute__((visibility("default")))

namespace ria {

// The dtypes of x, W and y: e4m3 or int8 x and W give a bf16 or fp16 y. The bias has y's dtype.
enum DataType : int {
  kBFloat16 = 0,
  kFloat16 = 1,
  kFloat8ToBFloat16 = 2,
  kFloat8ToFloat16 = 3,
  kInt8ToBFloat16 = 4,
  kInt8ToFloat16 = 5
};

// The dtype of x and W: k16Bits is that of y.
enum Operands : int { k16Bits = 0, kFloat8 = 1, kInt8 = 2 };

constexpr Operands operands_of(int data_type) { return Operands(data_type / 2); }
constexpr bool gives_bfloat16(int data_type) { return data_type % 2 == 0; }

enum Result : int { kOk = 0, kBadArgument = 1, kNotSupported = 2, kWorkspaceTooSmall = 3, kCudaError = 4 };

// How K is divided among thread blocks, as in CUTLASS's decomposition modes. 2 and more mean split-K in that many
// parts.
enum Decomposition : int { kStreamK = -1, kHeuristic = 0, kDataParallel = 1 };

// y[tokens, out] = x[tokens, in] @ W[out, in]^T + bias[out], all contiguous and row-major. With e4m3 or int8 operands
// the sums are multiplied by weight_scales[out] and token_scales[token] before the bias is added.
struct Problem {
  int data_type;
  int out_features;
  int in_features;
  int tokens;
  int split_k;  // a Decomposition, or the number of parts
  int num_sms;
  int device;
  void const* x;
  void const* values;         // [out, in/2]: the two kept values of each group of four, in column order
  void const* metadata;       // in the layout that metadata.h gives for this width of values
  void const* weight_scales;  // float [out]; null with 16-bit operands
  void const* token_scales;   // float [tokens]; null with 16-bit operands
  void const* bias;           // [out] or null
  void* y;
  void* workspace;
  size_t workspace_bytes;
  void* stream;
};

// One compiled tile shape. `can_implement` and `workspace_bytes` need no device.
struct Tile {
  char const* name;
  bool (*can_implement)(Problem const&);
  size_t (*workspace_bytes)(Problem const&);
  Result (*run)(Problem const&);
};

// Each tile's object file calls this when the library is loaded.
bool add_tile(Tile const&);

// Returns kCudaError and makes ria_last_error() return `what`, which is kept, not copied.
Result cuda_error(char const* what);

// kOk, or kCudaError with CUDA's own text.
Result result_of(cudaError_t error);

// Every workspace starts with the counters of the 2.x tiles. They must be zero before the first launch, and every
// launch leaves them zero.
constexpr size_t kCounterBytes = 64 * 1024;

}  // namespace ria
