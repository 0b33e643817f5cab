// One tile of the mma.sp kernel, for bf16 and fp16 on Ampere, Ada and the Blackwell GPUs that have mma.sync but not
// tcgen05 (12.x). The main loop is CUTLASS 2.x's. The rest is ours, because CUTLASS's sparse kernels write y^T only
// row-major, and we need it column-major: that is y [tokens, out], without a transposition.
//
// The build compiles this file once per tile, with the macros RIA_TILE_NAME, RIA_TILE_M (out-features), RIA_TILE_N
// (tokens), RIA_WARP_M, RIA_WARP_N and RIA_STAGES.
#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/threadblock/default_sparse_mma.h"
#include "cutlass/numeric_conversion.h"

#include "interface.h"
#include "metadata.h"

namespace ria {
namespace {

constexpr int kTileM = RIA_TILE_M, kTileN = RIA_TILE_N, kTileK = 64;
constexpr int kWarpM = RIA_WARP_M, kWarpN = RIA_WARP_N;
constexpr int kInstructionM = 16, kInstructionN = 8;
constexpr int kThreads = 32 * (kTileM / kWarpM) * (kTileN / kWarpN);
constexpr int kAlignment = 8;

template <class Element>
using Mainloop = typename cutlass::gemm::threadblock::DefaultSparseMma<
    Element, cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float,
    cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<kTileM, kTileN, kTileK>, cutlass::gemm::GemmShape<kWarpM, kWarpN, kTileK>,
    cutlass::gemm::GemmShape<kInstructionM, kInstructionN, 32>, RIA_STAGES,
    cutlass::arch::OpMultiplyAdd>::ThreadblockMma;

template <class Element>
struct Params {
  typename Mainloop<Element>::IteratorA::Params values_params;
  typename Mainloop<Element>::IteratorB::Params x_params;
  typename Mainloop<Element>::IteratorE::Params metadata_params;
  Element* values;
  Element* x;
  uint16_t* metadata;
  Element const* bias;
  Element* y;
  float* partial_sums;
  int* tile_counters;
  int out_features, in_features, tokens;
  int steps_per_split;
};

// Where an accumulator lies in the tile. mma.m16n8 gives a thread rows lane / 4 and lane / 4 + 8, columns
// 2 * (lane % 4) and the next; CUTLASS orders a warp's instructions down the rows first.
struct Coord { int row, column; };

CUTLASS_HOST_DEVICE constexpr Coord coord_of(int warp, int lane, int accumulator) {
  int const instruction = accumulator / 4, rows = kWarpM / kInstructionM;
  int const half = accumulator / 2 % 2, side = accumulator % 2;
  return {warp % (kTileM / kWarpM) * kWarpM + instruction % rows * kInstructionM + half * 8 + lane / 4,
          warp / (kTileM / kWarpM) * kWarpN + instruction / rows * kInstructionN + lane % 4 * 2 + side};
}

// Two lanes, four apart, hold neighbouring rows of the same two columns. They exchange values, so that each holds both
// rows of one column: one 32-bit store instead of two 16-bit ones.
template <class Element, int kCount>
CUTLASS_DEVICE void store(Params<Element> const& p, cutlass::Array<float, kCount> const& sums, int warp, int lane,
                          int first_row, int first_column) {
  cutlass::NumericConverter<Element, float> to_element;
  bool const upper = lane / 4 % 2;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kCount; i += 2) {
    float const received = __shfl_xor_sync(0xffffffffu, upper ? sums[i] : sums[i + 1], 4);
    float low = upper ? received : sums[i];
    float high = upper ? sums[i + 1] : received;
    Coord const coord = coord_of(warp, lane, i);
    int const row = first_row + coord.row - upper, column = first_column + coord.column + upper;
    if (row >= p.out_features || column >= p.tokens) continue;
    if (p.bias) {
      low += static_cast<float>(p.bias[row]);
      high += static_cast<float>(p.bias[row + 1]);
    }
    cutlass::Array<Element, 2> pair;
    pair[0] = to_element(low);
    pair[1] = to_element(high);
    *reinterpret_cast<cutlass::AlignedArray<Element, 2>*>(p.y + int64_t(column) * p.out_features + row) =
        *reinterpret_cast<cutlass::AlignedArray<Element, 2> const*>(&pair);
  }
}

// The reduction of split-K. Each thread block writes its sums to the workspace, and the last one to arrive adds them
// all, always in the order of K, so the result does not depend on timing. Returns true in the block that must store it.
template <class Element, int kCount>
CUTLASS_DEVICE bool reduce_splits(Params<Element> const& p, cutlass::Array<float, kCount>& sums) {
  __shared__ bool is_last;
  int const tile = blockIdx.x + blockIdx.y * gridDim.x;
  int64_t const split_stride = int64_t(gridDim.x) * gridDim.y * kCount * kThreads;
  float* const mine = p.partial_sums + int64_t(tile) * kCount * kThreads + threadIdx.x;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kCount; ++i) mine[blockIdx.z * split_stride + i * kThreads] = sums[i];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(p.tile_counters + tile, 1) == int(gridDim.z) - 1;
    if (is_last) p.tile_counters[tile] = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  sums.clear();
  for (int split = 0; split < int(gridDim.z); ++split) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] += __ldcg(mine + split * split_stride + i * kThreads);
  }
  return true;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) sparse_linear(__grid_constant__ Params<Element> const p) {
  using Mma = Mainloop<Element>;
  static_assert(Mma::kSparse == 2 && Mma::kElementsPerElementE == 8 && sizeof(typename Mma::ElementE) == 2);
  static_assert(cutlass::platform::is_same<typename Mma::LayoutE, cutlass::layout::ColumnMajorInterleaved<2>>::value);
  static_assert(Mma::WarpCount::kCount * 32 == kThreads && Mma::WarpCount::kM == kTileM / kWarpM);
  extern __shared__ __align__(128) uint8_t shared[];

  int const first_row = blockIdx.x * kTileM, first_column = blockIdx.y * kTileN;
  int const first_k = blockIdx.z * p.steps_per_split * kTileK;
  int const end_k = min(p.in_features, first_k + p.steps_per_split * kTileK);
  int const warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
  int const padded_rows = round_up(p.out_features, MetadataLayout<16>::kRowMultiple);

  typename Mma::IteratorA values(p.values_params, p.values, {p.out_features, end_k / 2}, threadIdx.x,
                                 {first_row, first_k / 2});
  typename Mma::IteratorB x(p.x_params, p.x, {end_k, p.tokens}, threadIdx.x, {first_k, first_column});
  typename Mma::IteratorE metadata(p.metadata_params, p.metadata, {padded_rows, end_k / 16}, threadIdx.x,
                                   {first_row, first_k / 16});

  Mma mma(*reinterpret_cast<typename Mma::SharedStorage*>(shared), threadIdx.x, warp, lane);
  typename Mma::FragmentC sums;
  sums.clear();
  mma((end_k - first_k) / kTileK, sums, values, x, metadata, sums);

  if (gridDim.z > 1 && !reduce_splits(p, sums)) return;
  store(p, sums, warp, lane, first_row, first_column);
}

struct Grid { int rows, columns, splits, steps_per_split; };

// Unless a number is given, K is split until the thread blocks fill the SMs, with at least 8 steps of K each.
Grid grid_of(Problem const& p) {
  int const rows = (p.out_features + kTileM - 1) / kTileM, columns = (p.tokens + kTileN - 1) / kTileN;
  int const steps = p.in_features / kTileK, tiles = rows * columns;
  int splits = p.split_k;
  if (p.split_k == kHeuristic || p.split_k == kStreamK) {
    int const wanted = p.num_sms / tiles, possible = steps / 8;
    splits = wanted < possible ? wanted : possible;
  }
  if (splits > steps) splits = steps;
  if (splits < 1 || size_t(tiles) * sizeof(int) > kCounterBytes) splits = 1;
  int const steps_per_split = (steps + splits - 1) / splits;
  return {rows, columns, (steps + steps_per_split - 1) / steps_per_split, steps_per_split};
}

bool can_implement(Problem const& p) {
  return !is_float8(p.data_type) && p.out_features % kAlignment == 0 && p.in_features % kTileK == 0 &&
         grid_of(p).columns <= 65535;
}

size_t workspace_bytes(Problem const& p) {
  Grid const grid = grid_of(p);
  return grid.splits > 1 ? size_t(grid.splits) * grid.rows * grid.columns * kTileM * kTileN * sizeof(float) : 0;
}

template <class Element>
Result run(Problem const& problem) {
  using Mma = Mainloop<Element>;
  if (!can_implement(problem)) return kNotSupported;
  if (workspace_bytes(problem) > problem.workspace_bytes - kCounterBytes) return kWorkspaceTooSmall;
  Grid const grid = grid_of(problem);
  int const padded_rows = round_up(problem.out_features, MetadataLayout<16>::kRowMultiple);
  Params<Element> const params{typename Mma::IteratorA::Params(cutlass::layout::RowMajor(problem.in_features / 2)),
                               typename Mma::IteratorB::Params(cutlass::layout::ColumnMajor(problem.in_features)),
                               typename Mma::IteratorE::Params(cutlass::layout::ColumnMajorInterleaved<2>::packed(
                                   {padded_rows, problem.in_features / 16})),
                               static_cast<Element*>(const_cast<void*>(problem.values)),
                               static_cast<Element*>(const_cast<void*>(problem.x)),
                               static_cast<uint16_t*>(const_cast<void*>(problem.metadata)),
                               static_cast<Element const*>(problem.bias),
                               static_cast<Element*>(problem.y),
                               reinterpret_cast<float*>(static_cast<uint8_t*>(problem.workspace) + kCounterBytes),
                               static_cast<int*>(problem.workspace),
                               problem.out_features,
                               problem.in_features,
                               problem.tokens,
                               grid.steps_per_split};
  constexpr int shared_bytes = int(sizeof(typename Mma::SharedStorage));
  static_assert(shared_bytes <= 98 * 1024, "more shared memory than sm_86, sm_89 and sm_120 have");
  if (cudaError_t const error =
          cudaFuncSetAttribute(sparse_linear<Element>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return result_of(error);
  sparse_linear<Element><<<dim3(grid.rows, grid.columns, grid.splits), kThreads, shared_bytes,
                           static_cast<cudaStream_t>(problem.stream)>>>(params);
  return result_of(cudaGetLastError());
}

Result run(Problem const& p) {
  return p.data_type == kBFloat16 ? run<cutlass::bfloat16_t>(p) : run<cutlass::half_t>(p);
}

[[maybe_unused]] bool const added = add_tile({RIA_TILE_NAME, can_implement, workspace_bytes, run});

}  // namespace
}  // namespace ria
