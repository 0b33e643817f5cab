// The C functions of a library: which tiles it has, how it lays out metadata, and the product itself.
#include <cuda_runtime.h>

#include <vector>

#include "interface.h"
#include "metadata.h"

namespace ria {
namespace {

std::vector<Tile>& tiles() {
  static std::vector<Tile> all;
  return all;
}

template <class Layout>
__global__ void pack_metadata(uint8_t const* bitmask, uint8_t* metadata, int rows, int columns, int64_t bytes) {
  Layout const layout(rows, columns);
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < bytes; i += int64_t(gridDim.x) * blockDim.x)
    pack_metadata_byte(bitmask, metadata, rows, columns, layout, i);
}

bool valid_sizes(int out_features, int in_features) {
  return out_features > 0 && in_features > 0 && in_features % 64 == 0;
}

// Returns use(layout), with the layout for values of `value_bits` bits, or `otherwise` if there is no such layout.
template <class Result, class Use>
Result with_layout(int value_bits, int out_features, int in_features, Result otherwise, Use use) {
  if (!valid_sizes(out_features, in_features)) return otherwise;
  if (value_bits == 16) return use(MetadataLayout<16>(out_features, in_features));
#if RIA_FAMILY != 100
  if (value_bits == 8) return use(MetadataLayout<8>(out_features, in_features));
#endif
  return otherwise;
}

// Makes `device` current while it lives, because launches go to the current device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    moved_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool moved_ = false;
};

}  // namespace

bool add_tile(Tile const& tile) {
  tiles().push_back(tile);
  return true;
}

static thread_local char const* last_cuda_error = "";

Result cuda_error(char const* what) {
  last_cuda_error = what;
  cudaGetLastError();  // clears it, so that it is not reported for the next launch
  return kCudaError;
}

Result result_of(cudaError_t error) { return error == cudaSuccess ? kOk : cuda_error(cudaGetErrorString(error)); }

}  // namespace ria

using namespace ria;

// Changes whenever the functions below do, so that a library built from older sources is refused.
RIA_API int ria_abi_version() { return 4; }

// CUDA's text for the calling thread's latest kCudaError.
RIA_API char const* ria_last_error() { return last_cuda_error; }

RIA_API int ria_family() { return RIA_FAMILY; }

RIA_API int ria_num_tiles() { return int(tiles().size()); }

RIA_API char const* ria_tile_name(int tile) {
  return tile >= 0 && tile < ria_num_tiles() ? tiles()[tile].name : nullptr;
}

// Size of the metadata in bytes, or -1. `value_bits`, here and below: 16, or 8 (not on 10.0).
RIA_API int64_t ria_metadata_bytes(int value_bits, int out_features, int in_features) {
  return with_layout(value_bits, out_features, in_features, int64_t(-1),
                     [&](auto layout) { return metadata_bytes<decltype(layout)>(out_features, in_features); });
}

RIA_API int64_t ria_metadata_offset(int value_bits, int out_features, int in_features, int row, int byte_column) {
  if (row < 0 || row >= out_features || byte_column < 0 || byte_column >= in_features / 8) return -1;
  return with_layout(value_bits, out_features, in_features, int64_t(-1),
                     [&](auto layout) { return layout.offset(row, byte_column); });
}

// Packs bitmask [out, in/8] into metadata [ria_metadata_bytes], both on the host.
RIA_API int ria_pack_metadata_host(int value_bits, void const* bitmask, void* metadata, int out_features,
                                   int in_features) {
  if (!bitmask || !metadata) return kBadArgument;
  return with_layout(value_bits, out_features, in_features, int(kBadArgument), [&](auto layout) {
    int64_t const bytes = metadata_bytes<decltype(layout)>(out_features, in_features);
    for (int64_t i = 0; i < bytes; ++i)
      pack_metadata_byte(static_cast<uint8_t const*>(bitmask), static_cast<uint8_t*>(metadata), out_features,
                         in_features, layout, i);
    return int(kOk);
  });
}

// The same on the device.
RIA_API int ria_pack_metadata(int value_bits, void const* bitmask, void* metadata, int out_features, int in_features,
                              int device, void* stream) {
  if (!bitmask || !metadata) return kBadArgument;
  DeviceGuard const guard(device);
  if (guard.error() != cudaSuccess) return result_of(guard.error());
  return with_layout(value_bits, out_features, in_features, int(kBadArgument), [&](auto layout) {
    using Layout = decltype(layout);
    int64_t const bytes = metadata_bytes<Layout>(out_features, in_features);
    int const threads = 256;
    int const blocks = int(bytes / threads < 4096 ? (bytes + threads - 1) / threads : 4096);
    pack_metadata<Layout><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<uint8_t const*>(bitmask), static_cast<uint8_t*>(metadata), out_features, in_features, bytes);
    return int(result_of(cudaGetLastError()));
  });
}

static Problem problem_of_sizes(int data_type, int out_features, int in_features, int tokens, int split_k,
                                int num_sms) {
  Problem problem{};
  problem.data_type = data_type;
  problem.out_features = out_features;
  problem.in_features = in_features;
  problem.tokens = tokens;
  problem.split_k = split_k;
  problem.num_sms = num_sms;
  return problem;
}

static bool valid_problem(int tile, Problem const& problem) {
  return tile >= 0 && tile < ria_num_tiles() && valid_sizes(problem.out_features, problem.in_features) &&
         problem.tokens > 0 && problem.num_sms > 0 && problem.split_k >= kStreamK && problem.data_type >= kBFloat16 &&
         problem.data_type <= kInt8ToFloat16;
}

// 1 if the tile can compute a product of these sizes. Needs no device.
RIA_API int ria_can_implement(int tile, int data_type, int out_features, int in_features, int tokens, int split_k,
                              int num_sms) {
  Problem const problem = problem_of_sizes(data_type, out_features, in_features, tokens, split_k, num_sms);
  return valid_problem(tile, problem) && tiles()[tile].can_implement(problem);
}

RIA_API int64_t ria_workspace_bytes(int tile, int data_type, int out_features, int in_features, int tokens, int split_k,
                                    int num_sms) {
  Problem const problem = problem_of_sizes(data_type, out_features, in_features, tokens, split_k, num_sms);
  if (!valid_problem(tile, problem)) return -1;
  return int64_t(kCounterBytes + tiles()[tile].workspace_bytes(problem));
}

// Enqueues the product on `stream`. It waits for nothing, so a CUDA graph can capture it.
RIA_API int ria_linear(int tile, int data_type, int out_features, int in_features, int tokens, int split_k, int num_sms,
                       int device, void const* x, void const* values, void const* metadata, void const* weight_scales,
                       void const* token_scales, void const* bias, void* y, void* workspace, int64_t workspace_bytes,
                       void* stream) {
  Problem problem = problem_of_sizes(data_type, out_features, in_features, tokens, split_k, num_sms);
  if (!valid_problem(tile, problem)) return kBadArgument;
  if (!x || !values || !metadata || !y || !workspace || workspace_bytes < int64_t(kCounterBytes)) return kBadArgument;
  if (operands_of(data_type) == k16Bits ? weight_scales || token_scales : !weight_scales || !token_scales)
    return kBadArgument;
  for (void const* pointer : {x, values, metadata, weight_scales, token_scales, bias, static_cast<void const*>(y),
                              static_cast<void const*>(workspace)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return kBadArgument;
  problem.device = device;
  problem.x = x;
  problem.values = values;
  problem.metadata = metadata;
  problem.weight_scales = weight_scales;
  problem.token_scales = token_scales;
  problem.bias = bias;
  problem.y = y;
  problem.workspace = workspace;
  problem.workspace_bytes = size_t(workspace_bytes);
  problem.stream = stream;
  DeviceGuard const guard(device);
  if (guard.error() != cudaSuccess) return result_of(guard.error());
  return tiles()[tile].run(problem);
}
