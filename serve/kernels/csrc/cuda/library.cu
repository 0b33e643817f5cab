// The C functions of a library: the tiles it holds, the metadata's layout, and the product.
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

__global__ void pack_metadata(uint8_t const* bitmask, uint8_t* metadata, int rows, int columns, int64_t bytes) {
  MetadataLayout const layout(rows, columns);
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < bytes; i += int64_t(gridDim.x) * blockDim.x)
    pack_metadata_byte(bitmask, metadata, rows, columns, layout, i);
}

bool has_sizes(int out_features, int in_features) { return out_features > 0 && in_features > 0 && in_features % 64 == 0; }

// Launches go to the context that is current; the caller's is left as it was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ok_ = cudaGetDevice(&before_) == cudaSuccess && (before_ == device || cudaSetDevice(device) == cudaSuccess);
    moved_ = ok_ && before_ != device;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  bool ok() const { return ok_; }

 private:
  int before_ = 0;
  bool ok_ = false;
  bool moved_ = false;
};

}  // namespace

bool add_tile(Tile const& tile) {
  tiles().push_back(tile);
  return true;
}

}  // namespace ria

using namespace ria;

RIA_API int ria_family() { return RIA_FAMILY; }

RIA_API int ria_tiles() { return int(tiles().size()); }

RIA_API char const* ria_tile_name(int tile) { return tile >= 0 && tile < ria_tiles() ? tiles()[tile].name : nullptr; }

RIA_API int64_t ria_metadata_bytes(int out_features, int in_features) {
  return has_sizes(out_features, in_features) ? metadata_bytes(out_features, in_features) : -1;
}

RIA_API int64_t ria_metadata_offset(int out_features, int in_features, int row, int byte_column) {
  if (!has_sizes(out_features, in_features)) return -1;
  if (row < 0 || row >= out_features || byte_column < 0 || byte_column >= in_features / 8) return -1;
  return MetadataLayout(out_features, in_features).offset(row, byte_column);
}

// bitmask [out, in/8] to metadata [ria_metadata_bytes], both on the host.
RIA_API int ria_pack_metadata_host(void const* bitmask, void* metadata, int out_features, int in_features) {
  if (!has_sizes(out_features, in_features) || !bitmask || !metadata) return kBadArgument;
  MetadataLayout const layout(out_features, in_features);
  for (int64_t i = 0, bytes = metadata_bytes(out_features, in_features); i < bytes; ++i)
    pack_metadata_byte(static_cast<uint8_t const*>(bitmask), static_cast<uint8_t*>(metadata), out_features, in_features,
                       layout, i);
  return kOk;
}

// The same on the device.
RIA_API int ria_pack_metadata(void const* bitmask, void* metadata, int out_features, int in_features, int device,
                              void* stream) {
  if (!has_sizes(out_features, in_features) || !bitmask || !metadata) return kBadArgument;
  DeviceGuard const guard(device);
  if (!guard.ok()) return kCudaError;
  int64_t const bytes = metadata_bytes(out_features, in_features);
  int const threads = 256;
  int const blocks = int(bytes / threads < 4096 ? (bytes + threads - 1) / threads : 4096);
  pack_metadata<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint8_t const*>(bitmask), static_cast<uint8_t*>(metadata), out_features, in_features, bytes);
  return cudaGetLastError() == cudaSuccess ? kOk : kCudaError;
}

static Problem sizes_only(int data_type, int out_features, int in_features, int tokens, int split, int multiprocessors) {
  Problem problem{};
  problem.data_type = data_type;
  problem.out_features = out_features;
  problem.in_features = in_features;
  problem.tokens = tokens;
  problem.split = split;
  problem.multiprocessors = multiprocessors;
  return problem;
}

static bool has_tile(int tile, Problem const& problem) {
  return tile >= 0 && tile < ria_tiles() && has_sizes(problem.out_features, problem.in_features) &&
         problem.tokens > 0 && problem.multiprocessors > 0 && problem.split >= kSplitForced &&
         (problem.data_type == kBFloat16 || problem.data_type == kFloat16);
}

// 1 when the tile can compute a product of these sizes; no device is touched.
RIA_API int ria_accepts(int tile, int data_type, int out_features, int in_features, int tokens, int split,
                        int multiprocessors) {
  Problem const problem = sizes_only(data_type, out_features, in_features, tokens, split, multiprocessors);
  return has_tile(tile, problem) && tiles()[tile].accepts(problem);
}

RIA_API int64_t ria_workspace_bytes(int tile, int data_type, int out_features, int in_features, int tokens, int split,
                                    int multiprocessors) {
  Problem const problem = sizes_only(data_type, out_features, in_features, tokens, split, multiprocessors);
  if (!has_tile(tile, problem)) return -1;
  return int64_t(kCounterBytes + tiles()[tile].workspace_bytes(problem));
}

// Enqueues the product on `stream`; waits for nothing, so it can be captured in a CUDA graph.
RIA_API int ria_linear(int tile, int data_type, int out_features, int in_features, int tokens, int split,
                       int multiprocessors, int device, void const* x, void const* values, void const* metadata,
                       void const* bias, void* y, void* workspace, int64_t workspace_bytes, void* stream) {
  Problem problem = sizes_only(data_type, out_features, in_features, tokens, split, multiprocessors);
  if (!has_tile(tile, problem)) return kBadArgument;
  if (!x || !values || !metadata || !y || !workspace || workspace_bytes < int64_t(kCounterBytes)) return kBadArgument;
  for (void const* pointer : {x, values, metadata, bias, static_cast<void const*>(y), static_cast<void const*>(workspace)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return kBadArgument;
  problem.device = device;
  problem.x = x;
  problem.values = values;
  problem.metadata = metadata;
  problem.bias = bias;
  problem.y = y;
  problem.workspace = workspace;
  problem.workspace_bytes = size_t(workspace_bytes);
  problem.stream = stream;
  DeviceGuard const guard(device);
  if (!guard.ok()) return kCudaError;
  return tiles()[tile].run(problem);
}
