// Replaces the CUDA runtime that nvcc's objects call, so that a library's own host code drives the emulator.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

#include "machine.h"
#include "tensor_map.h"

namespace {

using namespace emulator;

// A registered kernel and its attributes.
struct Registered {
  Kernel* kernel;
  size_t dynamic_shared = 0;
  bool large_clusters = false;
};

struct State {
  std::mutex lock;
  std::vector<std::unique_ptr<Module>> modules;
  std::map<void const*, Registered> kernels;  // by host stub
  std::string error;                          // reason for the last failure
  cudaError_t last = cudaSuccess;             // cleared by cudaGetLastError
  Load load;                                  // of the last successful launch
  uint64_t seed = 0;
  uint32_t num_sms = 8;
};

State& state() {
  static State all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};
thread_local Configuration pushed;

// The PTX in nvcc's fat binary, which must not be compressed: each text starts with .version and ends with a zero.
std::vector<std::string_view> embedded_ptx(void const* container) {
  auto const* header = static_cast<unsigned char const*>(container);
  uint64_t size;
  std::memcpy(&size, header + 8, 8);  // after magic, version and size of the header: the size of what follows
  std::string_view const all(static_cast<char const*>(container), size + 16);
  std::vector<std::string_view> found;
  for (size_t at = 0; (at = all.find(".version ", at)) != all.npos;) {
    size_t const end = std::min(all.find('\0', at), all.size());
    found.push_back(all.substr(at, end - at));
    at = end;
  }
  return found;
}

cudaError_t failed(std::string const& why, cudaError_t code = cudaErrorLaunchFailure) {
  state().error = why;
  state().last = code;
  return code;
}

// The most shared memory of a block, from the CUDA programming guide's table of compute capabilities.
size_t shared_limit(int target) {
  static std::map<int, size_t> const kibibytes = {{80, 163}, {86, 99}, {89, 99}, {90, 227}, {100, 227}, {120, 99}};
  auto const found = kibibytes.find(target);
  return found == kibibytes.end() ? 0 : found->second * 1024;
}

// Throws if CUDA would refuse this launch.
void check(Launch const& launch, Registered const& registered) {
  Kernel const& kernel = *launch.kernel;
  int const target = kernel.module->target;
  Dim const &grid = launch.grid, &cluster = launch.cluster;
  uint64_t const threads = launch.block.count(), blocks = cluster.count();
  if (!grid.count() || !threads || !blocks) throw Error("an empty grid");
  if (grid.x > 0x7FFF'FFFF || grid.y > 65535 || grid.z > 65535) throw Error("a grid that is too large");
  if (threads > 1024 || launch.block.z > 64) throw Error("a block that is too large");
  if (threads > kernel.most_threads) throw Error("more threads than .maxntid allows");
  if (blocks > 1 && target < 90) throw Error("a cluster on an architecture without clusters");
  if (blocks > (registered.large_clusters ? 16 : 8)) throw Error("a cluster of too many blocks");
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    throw Error("a grid that is not a multiple of the cluster");
  size_t const shared = kernel.static_shared + launch.dynamic_shared;
  if (shared > 48 * 1024 && launch.dynamic_shared > registered.dynamic_shared)
    throw Error("more than 48 KiB of shared memory without cudaFuncSetAttribute");
  if (shared > shared_limit(target)) throw Error("more shared memory than the architecture has");
}

void run(Launch const& launch, void** arguments) {
  Kernel& kernel = *launch.kernel;
  decode(kernel);
  for (size_t i = 0; i < kernel.parameters.size(); ++i)
    std::memcpy(kernel.parameter_base + kernel.parameters[i].first, arguments[i], kernel.parameters[i].second);
  global_memory().allow(kernel.parameter_base, kernel.parameter_bytes, false);
  for (Global const& each : kernel.module->globals) global_memory().allow(each.start, each.bytes, each.writable);
  Grid grid(launch);
  grid.run();
  state().load = grid.load;
}

cudaError_t launch(Registered const& registered, dim3 grid, dim3 block, void** arguments, size_t shared, dim3 cluster) {
  std::lock_guard const guard(state().lock);
  if (state().last == cudaSuccess) state().error.clear();
  Launch const launch{registered.kernel,
                      {grid.x, grid.y, grid.z},
                      {block.x, block.y, block.z},
                      {cluster.x, cluster.y, cluster.z},
                      shared,
                      state().num_sms,
                      state().seed};
  size_t const ranges = global_memory().size();
  std::string error;
  try {
    check(launch, registered);
    run(launch, arguments);
  } catch (std::exception const& caught) {
    error = registered.kernel->name.substr(0, 60) + ": " + caught.what();
  }
  global_memory().shrink(ranges);
  return error.empty() ? cudaSuccess : failed(error);
}

cudaError_t launch_stub(void const* stub, dim3 grid, dim3 block, void** arguments, size_t shared, dim3 cluster) {
  auto const found = state().kernels.find(stub);
  return found == state().kernels.end() ? failed("an unknown kernel", cudaErrorInvalidDeviceFunction)
                                        : launch(found->second, grid, block, arguments, shared, cluster);
}

dim3 cluster_of(cudaLaunchConfig_t const& config) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      auto const& size = config.attrs[i].val.clusterDim;
      cluster = dim3(size.x, size.y, size.z);
    }
  return cluster;
}

CUresult encode_tensor_map(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           cuuint64_t const* sizes, cuuint64_t const* strides, cuuint32_t const* box,
                           cuuint32_t const* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static std::map<CUtensorMapDataType, uint32_t> const bytes = {
      {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1},    {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2},  {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4},
      {CU_TENSOR_MAP_DATA_TYPE_INT32, 4},    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2}, {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4},
      {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2}, {CU_TENSOR_MAP_DATA_TYPE_UINT64, 8},  {CU_TENSOR_MAP_DATA_TYPE_INT64, 8}};
  static std::map<CUtensorMapSwizzle, uint32_t> const swizzles = {{CU_TENSOR_MAP_SWIZZLE_NONE, 0},
                                                                  {CU_TENSOR_MAP_SWIZZLE_32B, 32},
                                                                  {CU_TENSOR_MAP_SWIZZLE_64B, 64},
                                                                  {CU_TENSOR_MAP_SWIZZLE_128B, 128}};
  auto const element = bytes.find(type);
  auto const mode = swizzles.find(swizzle);
  // The restrictions in the driver API's manual.
  if (element == bytes.end() || mode == swizzles.end() || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || rank < 1 || rank > 5)
    return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uint64_t>(to) % 64 || reinterpret_cast<uint64_t>(address) % 16) return CUDA_ERROR_INVALID_VALUE;
  TensorMap map{};
  map.magic = TensorMap::kMagic;
  map.rank = rank;
  map.element_bytes = element->second;
  map.swizzle_bytes = mode->second;
  map.address = reinterpret_cast<uint64_t>(address);
  for (uint32_t d = 0; d < rank; ++d) {
    bool const right = sizes[d] >= 1 && sizes[d] >> 32 == 0 && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
    if (!right) return CUDA_ERROR_INVALID_VALUE;
    map.sizes[d] = uint32_t(sizes[d]);
    map.box[d] = uint16_t(box[d]);
    if (d + 1 == rank) break;
    if (strides[d] % 16 || strides[d] >> 40) return CUDA_ERROR_INVALID_VALUE;
    map.strides[d] = strides[d];
  }
  uint32_t const inner = box[0] * map.element_bytes;
  if (inner % 16 || (map.swizzle_bytes && inner > map.swizzle_bytes)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(to, &map, sizeof map);
  return CUDA_SUCCESS;
}

CUresult driver_version(int* version) {
  *version = CUDART_VERSION;
  return CUDA_SUCCESS;
}

}  // namespace

#define SHOWN extern "C" __attribute__((visibility("default")))

// Lets kernels read, and if `writable` write, this part of the process's memory.
SHOWN void emulator_allow(void const* start, size_t bytes, int writable) {
  global_memory().allow(start, bytes, writable);
}
SHOWN void emulator_forget() { global_memory().shrink(0); }

// seed 0: threads in order, asynchronous work as late as possible; any other: both at random. Clears earlier errors.
SHOWN void emulator_configure(uint64_t seed, uint32_t num_sms) {
  state().seed = seed;
  state().num_sms = num_sms;
  state().error.clear();
  state().last = cudaSuccess;
}

// Runs a kernel of this PTX, with clusters along x. Returns 0, or 1 and sets emulator_error().
SHOWN int emulator_run(char const* text, char const* name, uint32_t blocks, uint32_t threads, uint32_t cluster,
                       size_t shared, void** arguments) {
  try {
    auto const module = parse(text);
    for (auto& kernel : module->kernels)
      if (kernel->name == name)
        return launch({kernel.get()}, dim3(blocks), dim3(threads), arguments, shared, dim3(cluster)) != cudaSuccess;
    failed("no kernel of this name");
  } catch (std::exception const& error) {
    failed(error.what());
  }
  return 1;
}

// The last launch: blocks that used the tensor cores, most instructions of one block, instructions of all.
SHOWN void emulator_load(uint64_t* blocks, uint64_t* most, uint64_t* all) {
  *blocks = state().load.blocks;
  *most = state().load.most;
  *all = state().load.all;
}

// Why the last call failed; empty if none did.
SHOWN char const* emulator_error() { return state().error.c_str(); }

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    void const* container;
  };
  auto* const handle = new std::vector<Module*>;
  std::lock_guard const guard(state().lock);
  try {
    for (std::string_view text : embedded_ptx(static_cast<Wrapper*>(wrapper)->container)) {
      state().modules.push_back(parse(text));
      handle->push_back(state().modules.back().get());
    }
  } catch (std::exception const& error) {
    std::fprintf(stderr, "emulator: %s\n", error.what());
    std::abort();
  }
  return reinterpret_cast<void**>(handle);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, char const*, int, size_t, int, int) {}

void __cudaRegisterFunction(void** handle, char const* stub, char*, char const* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  std::lock_guard const guard(state().lock);
  for (Module* module : *reinterpret_cast<std::vector<Module*>*>(handle))
    for (auto& kernel : module->kernels)
      if (kernel->name == name) state().kernels[stub] = {kernel.get()};
}

cudaError_t __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return cudaSuccess;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch_stub(kernel, grid, block, arguments, shared, dim3(1, 1, 1));
}
cudaError_t cudaLaunchKernel(void const* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch_stub(stub, grid, block, arguments, shared, dim3(1, 1, 1));
}
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* stub, void** arguments) {
  return launch_stub(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, cluster_of(*config));
}

cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  if (!bytes) return cudaSuccess;
  try {
    std::memset(global_memory().at(reinterpret_cast<uint64_t>(start), bytes, true), value, bytes);
    return cudaSuccess;
  } catch (Error const& error) {
    return failed(std::string("cudaMemsetAsync: ") + error.what());
  }
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return state().last; }
cudaError_t cudaGetLastError() { return std::exchange(state().last, cudaSuccess); }
char const* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
cudaError_t cudaFuncSetAttribute(void const* stub, cudaFuncAttribute attribute, int value) {
  auto const found = state().kernels.find(stub);
  if (found == state().kernels.end()) return failed("an unknown kernel", cudaErrorInvalidDeviceFunction);
  Registered& registered = found->second;
  Kernel const& kernel = *registered.kernel;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) registered.large_clusters = value;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || kernel.static_shared + size_t(value) > shared_limit(kernel.module->target))
    return failed("more shared memory than the architecture has", cudaErrorInvalidValue);
  registered.dynamic_shared = size_t(value);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? int(state().num_sms) : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void const*, cudaLaunchConfig_t const* config) {
  dim3 const cluster = cluster_of(*config);
  *clusters = int(state().num_sms / (cluster.x * cluster.y * cluster.z));
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (std::string_view(name) == "cuTensorMapEncodeTiled") *function = reinterpret_cast<void*>(&encode_tensor_map);
  if (std::string_view(name) == "cuDriverGetVersion") *function = reinterpret_cast<void*>(&driver_version);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
