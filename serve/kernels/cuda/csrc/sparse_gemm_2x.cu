// One tile of the mma.sp kernel, for bf16 and fp16 or for int8 with bf16 or fp16 output, on Ampere, Ada and the
// Blackwell GPUs that have mma.sync but not tcgen05 (12.x). The main loop is CUTLASS 2.x's. The rest is ours, because
// CUTLASS's sparse kernels write y^T only row-major, and we need it column-major: that is y [tokens, out], without a
// transposition.
//
// The build compiles this file once per tile, with the macros RIA_TILE_NAME, RIA_TILE_M (out-features), RIA_TILE_N
// (tokens), RIA_WARP_M, RIA_WARP_N, RIA_STAGES, and RIA_INT8 0 or 1 (1: W and x are int8, with one scale per
// out-feature and per token).
#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/threadblock/default_sparse_mma.h"
#include "cutlass/numeric_conversion.h"

#include "interface.h"
#include "metadata.h"

namespace ria {
namespace {

constexpr int kValueBits = RIA_INT8 ? 8 : 16;
constexpr int kTileM = RIA_TILE_M, kTileN = RIA_TILE_N, kTileK = 1024 / kValueBits;  // 128 bytes of x
constexpr int kWarpM = RIA_WARP_M, kWarpN = RIA_WARP_N;
constexpr int kInstructionM = 16, kInstructionN = 8, kInstructionK = kTileK / 2;
constexpr int kThreads = 32 * (kTileM / kWarpM) * (kTileN / kWarpN);
constexpr int kInputAlignment = 128 / kValueBits, kOutputAlignment = 8;

using Metadata = MetadataLayout<kValueBits>;
static_assert(kTileK == Metadata::kColumnMultiple);

#if RIA_INT8
using Accumulator = int32_t;
using Operator = cutlass::arch::OpMultiplyAddSaturate;
template <class Output>
using Element = int8_t;
#else
using Accumulator = float;
using Operator = cutlass::arch::OpMultiplyAdd;
template <class Output>
using Element = Output;
#endif

template <class Output>
using Mainloop = typename cutlass::gemm::threadblock::DefaultSparseMma<
    Element<Output>, cutlass::layout::RowMajor, kInputAlignment, Element<Output>, cutlass::layout::ColumnMajor,
    kInputAlignment, Accumulator, cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<kTileM, kTileN, kTileK>, cutlass::gemm::GemmShape<kWarpM, kWarpN, kTileK>,
    cutlass::gemm::GemmShape<kInstructionM, kInstructionN, kInstructionK>, RIA_STAGES, Operator>::ThreadblockMma;

template <class Output>
struct Params {
  typename Mainloop<Output>::IteratorA::Params values_params;
  typename Mainloop<Output>::IteratorB::Params x_params;
  typename Mainloop<Output>::IteratorE::Params metadata_params;
  Element<Output>* values;
  Element<Output>* x;
  typename Mainloop<Output>::ElementE* metadata;
  float const* weight_scales;
  float const* token_scales;
  Output const* bias;
  Output* y;
  Accumulator* partial_sums;
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

// What becomes of a sum before it is rounded to y's dtype. With int8 operands each operation is rounded on its own, as
// serve/kernels/int8_inputs.py says.
template <class Output>
CUTLASS_DEVICE float finished(Params<Output> const& p, Accumulator sum, int row, int column) {
#if RIA_INT8
  float const y = __fmul_rn(__fmul_rn(static_cast<float>(sum), p.weight_scales[row]), p.token_scales[column]);
#else
  float const y = sum;
#endif
  return p.bias ? y + static_cast<float>(p.bias[row]) : y;
}

// Two lanes, four apart, hold neighbouring rows of the same two columns. They exchange values, so that each holds both
// rows of one column: one 32-bit store instead of two 16-bit ones.
template <class Output, int kCount>
CUTLASS_DEVICE void store(Params<Output> const& p, cutlass::Array<Accumulator, kCount> const& sums, int warp, int lane,
                          int first_row, int first_column) {
  cutlass::NumericConverter<Output, float> to_output;
  bool const upper = lane / 4 % 2;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kCount; i += 2) {
    Accumulator const received = __shfl_xor_sync(0xffffffffu, upper ? sums[i] : sums[i + 1], 4);
    Accumulator const low = upper ? received : sums[i];
    Accumulator const high = upper ? sums[i + 1] : received;
    Coord const coord = coord_of(warp, lane, i);
    int const row = first_row + coord.row - upper, column = first_column + coord.column + upper;
    if (row >= p.out_features || column >= p.tokens) continue;
    cutlass::Array<Output, 2> pair;
    pair[0] = to_output(finished(p, low, row, column));
    pair[1] = to_output(finished(p, high, row + 1, column));
    *reinterpret_cast<cutlass::AlignedArray<Output, 2>*>(p.y + int64_t(column) * p.out_features + row) =
        *reinterpret_cast<cutlass::AlignedArray<Output, 2> const*>(&pair);
  }
}

// The reduction of split-K. Each thread block writes its sums to the workspace, and the last one to arrive adds them
// all, always in the order of K, so the result does not depend on timing. Returns true in the block that must store it.
template <class Output, int kCount>
CUTLASS_DEVICE bool reduce_splits(Params<Output> const& p, cutlass::Array<Accumulator, kCount>& sums) {
  __shared__ bool is_last;
  int const tile = blockIdx.x + blockIdx.y * gridDim.x;
  int64_t const split_stride = int64_t(gridDim.x) * gridDim.y * kCount * kThreads;
  Accumulator* const mine = p.partial_sums + int64_t(tile) * kCount * kThreads + threadIdx.x;
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

template <class Output>
__global__ void __launch_bounds__(kThreads) sparse_linear(__grid_constant__ Params<Output> const p) {
  using Mma = Mainloop<Output>;
  static_assert(Mma::kSparse == 2 && 2 * Mma::kElementsPerElementE == Metadata::kElementColumns);
  static_assert(sizeof(typename Mma::ElementE) == Metadata::kElementBytes);
  static_assert(cutlass::platform::is_same<typename Mma::LayoutE, cutlass::layout::ColumnMajorInterleaved<2>>::value);
  static_assert(Mma::WarpCount::kCount * 32 == kThreads && Mma::WarpCount::kM == kTileM / kWarpM);
  extern __shared__ __align__(128) uint8_t shared[];

  int const first_row = blockIdx.x * kTileM, first_column = blockIdx.y * kTileN;
  int const first_k = blockIdx.z * p.steps_per_split * kTileK;
  int const end_k = min(p.in_features, first_k + p.steps_per_split * kTileK);
  int const warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
  int const padded_rows = round_up(p.out_features, Metadata::kRowMultiple);

  typename Mma::IteratorA values(p.values_params, p.values, {p.out_features, end_k / 2}, threadIdx.x,
                                 {first_row, first_k / 2});
  typename Mma::IteratorB x(p.x_params, p.x, {end_k, p.tokens}, threadIdx.x, {first_k, first_column});
  typename Mma::IteratorE metadata(p.metadata_params, p.metadata, {padded_rows, end_k / Metadata::kElementColumns},
                                   threadIdx.x, {first_row, first_k / Metadata::kElementColumns});

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
  if (operands_of(p.data_type) != (RIA_INT8 ? kInt8 : k16Bits)) return false;
  if (RIA_INT8 && p.in_features > 1 << 18) return false;  // a sum could leave 32 bits
  return p.out_features % kOutputAlignment == 0 && p.in_features % kTileK == 0 && grid_of(p).columns <= 65535;
}

size_t workspace_bytes(Problem const& p) {
  Grid const grid = grid_of(p);
  return grid.splits > 1 ? size_t(grid.splits) * grid.rows * grid.columns * kTileM * kTileN * sizeof(Accumulator) : 0;
}

template <class Output>
Result run(Problem const& problem) {
  using Mma = Mainloop<Output>;
  if (!can_implement(problem)) return kNotSupported;
  if (workspace_bytes(problem) > problem.workspace_bytes - kCounterBytes) return kWorkspaceTooSmall;
  Grid const grid = grid_of(problem);
  Params<Output> const params{
      typename Mma::IteratorA::Params(cutlass::layout::RowMajor(problem.in_features / 2)),
      typename Mma::IteratorB::Params(cutlass::layout::ColumnMajor(problem.in_features)),
      typename Mma::IteratorE::Params(Metadata(problem.out_features, problem.in_features).layout),
      static_cast<Element<Output>*>(const_cast<void*>(problem.values)),
      static_cast<Element<Output>*>(const_cast<void*>(problem.x)),
      static_cast<typename Mma::ElementE*>(const_cast<void*>(problem.metadata)),
      static_cast<float const*>(problem.weight_scales),
      static_cast<float const*>(problem.token_scales),
      static_cast<Output const*>(problem.bias),
      static_cast<Output*>(problem.y),
      reinterpret_cast<Accumulator*>(static_cast<uint8_t*>(problem.workspace) + kCounterBytes),
      static_cast<int*>(problem.workspace),
      problem.out_features,
      problem.in_features,
      problem.tokens,
      grid.steps_per_split};
  constexpr int shared_bytes = int(sizeof(typename Mma::SharedStorage));
  static_assert(shared_bytes <= 98 * 1024, "more shared memory than sm_86, sm_89 and sm_120 have");
  if (cudaError_t const error =
          cudaFuncSetAttribute(sparse_linear<Output>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return result_of(error);
  sparse_linear<Output><<<dim3(grid.rows, grid.columns, grid.splits), kThreads, shared_bytes,
                          static_cast<cudaStream_t>(problem.stream)>>>(params);
  return result_of(cudaGetLastError());
}

Result run(Problem const& p) {
  return gives_bfloat16(p.data_type) ? run<cutlass::bfloat16_t>(p) : run<cutlass::half_t>(p);
}

[[maybe_unused]] bool const added = add_tile({RIA_TILE_NAME, can_implement, workspace_bytes, run});

}  // namespace
}  // namespace ria
