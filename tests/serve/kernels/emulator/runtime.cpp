// Stands in for the CUDA runtime that nvcc's objects ask for, so that a library's own host code drives the emulator.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

#include "machine.h"
#include "tensor_map.h"

namespace {

using namespace emulator;

struct State {
  std::mutex lock;
  std::vector<std::unique_ptr<Module>> modules;
  std::map<void const*, Kernel*> kernels;  // by the host's stub
  std::string error;                       // of the last launch that failed
  bool has_failed = false;                 // until somebody asks
  Load load;                               // of the last one that did not
  uint64_t seed = 0;
  uint32_t multiprocessors = 8;
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

// The PTX inside a container of nvcc's, which must not be compressed: it starts with its version and ends with a zero.
std::vector<std::string_view> texts(void const* container) {
  auto const* header = static_cast<unsigned char const*>(container);
  uint64_t size;
  std::memcpy(&size, header + 8, 8);  // magic, version, bytes of the header; then the bytes that follow it
  std::string_view const all(static_cast<char const*>(container), size + 16);
  std::vector<std::string_view> found;
  for (size_t at = 0; (at = all.find(".version ", at)) != all.npos;) {
    size_t const end = std::min(all.find('\0', at), all.size());
    found.push_back(all.substr(at, end - at));
    at = end;
  }
  return found;
}

cudaError_t failed(std::string const& why) {
  state().error = why;
  state().has_failed = true;
  return cudaErrorLaunchFailure;
}

cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared, dim3 cluster) {
  std::lock_guard const guard(state().lock);
  size_t const ranges = global_memory().size();
  std::string error;
  try {
    decode(kernel);
    for (size_t i = 0; i < kernel.parameters.size(); ++i)
      std::memcpy(kernel.parameter_base + kernel.parameters[i].first, arguments[i], kernel.parameters[i].second);
    global_memory().allow(kernel.parameter_base, kernel.parameter_bytes, false);
    Launch launched;
    launched.kernel = &kernel;
    launched.grid = {grid.x, grid.y, grid.z};
    launched.block = {block.x, block.y, block.z};
    launched.cluster = {cluster.x, cluster.y, cluster.z};
    if (launched.grid.count() == 0 || launched.block.count() == 0) throw Error("an empty grid");
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) throw Error("a grid that clusters do not fill");
    launched.dynamic_shared = uint32_t(shared);
    launched.resident = state().multiprocessors;
    launched.seed = state().seed;
    Grid running(launched);
    running.run();
    state().load = running.load;
  } catch (std::exception const& caught) {
    error = kernel.name.substr(0, 60) + ": " + caught.what();
  }
  global_memory().shrink(ranges);
  return error.empty() ? cudaSuccess : failed(error);
}

cudaError_t launch_stub(void const* stub, dim3 grid, dim3 block, void** arguments, size_t shared, dim3 cluster) {
  auto const found = state().kernels.find(stub);
  return found == state().kernels.end() ? failed("an unknown kernel")
                                        : launch(*found->second, grid, block, arguments, shared, cluster);
}

CUresult encode_tensor_map(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           cuuint64_t const* sizes, cuuint64_t const* strides, cuuint32_t const* box,
                           cuuint32_t const* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static std::map<CUtensorMapDataType, uint32_t> const bytes = {
      {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1},   {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2},   {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4},
      {CU_TENSOR_MAP_DATA_TYPE_INT32, 4},   {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2},  {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4},
      {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2}, {CU_TENSOR_MAP_DATA_TYPE_UINT64, 8},  {CU_TENSOR_MAP_DATA_TYPE_INT64, 8}};
  static std::map<CUtensorMapSwizzle, uint32_t> const swizzles = {{CU_TENSOR_MAP_SWIZZLE_NONE, 0},
                                                                  {CU_TENSOR_MAP_SWIZZLE_32B, 32},
                                                                  {CU_TENSOR_MAP_SWIZZLE_64B, 64},
                                                                  {CU_TENSOR_MAP_SWIZZLE_128B, 128}};
  auto const element = bytes.find(type);
  auto const mode = swizzles.find(swizzle);
  // What the driver's manual demands.
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
    if (sizes[d] < 1 || sizes[d] >> 32 || box[d] < 1 || box[d] > 256 || element_strides[d] != 1) return CUDA_ERROR_INVALID_VALUE;
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

// Of this process's memory, what kernels may touch.
SHOWN void emulator_allow(void const* start, size_t bytes, int writable) { global_memory().allow(start, bytes, writable); }
SHOWN void emulator_forget() { global_memory().shrink(0); }

// seed 0: threads in order, asynchronous work as late as can be; any other: both at random.
SHOWN void emulator_configure(uint64_t seed, uint32_t multiprocessors) {
  state().seed = seed;
  state().multiprocessors = multiprocessors;
}

// Runs a kernel of this PTX with one block a multiprocessor at most; 0, or 1 with the reason in emulator_error().
SHOWN int emulator_run(char const* text, char const* name, uint32_t blocks, uint32_t threads, void** arguments) {
  try {
    auto const module = parse(text);
    for (auto& kernel : module->kernels)
      if (kernel->name == name)
        return launch(*kernel, dim3(blocks, 1, 1), dim3(threads, 1, 1), arguments, 0, dim3(1, 1, 1)) != cudaSuccess;
    failed("no kernel of this name");
  } catch (std::exception const& error) {
    failed(error.what());
  }
  return 1;
}

// Instructions of all kernels that were launched, and how many of them ever ran.
SHOWN void emulator_coverage(uint64_t* reached, uint64_t* all) {
  *reached = *all = 0;
  for (auto const& module : state().modules)
    for (auto const& kernel : module->kernels)
      for (Instruction const& instruction : kernel->code) {
        *all += kernel->decoded;
        *reached += instruction.ran;
      }
}

// Of the last launch: blocks that used the tensor cores, the most instructions of one of them, of all together.
SHOWN void emulator_load(uint64_t* blocks, uint64_t* most, uint64_t* all) {
  *blocks = state().load.blocks;
  *most = state().load.most;
  *all = state().load.all;
}

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
    for (std::string_view text : texts(static_cast<Wrapper*>(wrapper)->container)) {
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

void __cudaRegisterFunction(void** handle, char const* stub, char*, char const* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard const guard(state().lock);
  for (Module* module : *reinterpret_cast<std::vector<Module*>*>(handle))
    for (auto& kernel : module->kernels)
      if (kernel->name == name) state().kernels[stub] = kernel.get();
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
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch_stub(kernel, grid, block, arguments, shared, dim3(1, 1, 1));
}
cudaError_t cudaLaunchKernel(void const* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch_stub(stub, grid, block, arguments, shared, dim3(1, 1, 1));
}
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* stub, void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      auto const& size = config->attrs[i].val.clusterDim;
      cluster = dim3(size.x, size.y, size.z);
    }
  return launch_stub(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, cluster);
}

cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  std::memset(start, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return state().has_failed ? cudaErrorLaunchFailure : cudaSuccess; }
cudaError_t cudaGetLastError() {
  cudaError_t const error = cudaPeekAtLastError();
  state().has_failed = false;
  return error;
}
char const* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute attribute, int value) {
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > 227 * 1024 ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? int(state().multiprocessors) : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void const*, cudaLaunchConfig_t const* config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      size = config->attrs[i].val.clusterDim.x * config->attrs[i].val.clusterDim.y * config->attrs[i].val.clusterDim.z;
  *clusters = int(state().multiprocessors / size);
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
