// One tile of the CUTLASS 3.x kernel, for bf16 and fp16 or, on Hopper, for fp8 (e4m3) with bf16 or fp16 output:
// y^T = W x^T, where W, the first operand, is sparse.
//
// y^T [out, tokens] is written column-major, which is y [tokens, out] row-major, so nothing is transposed. A bias per
// output feature is then a bias per row. The build compiles this file once per tile, with the macros
//   RIA_FAMILY 90 or 100, RIA_TILE_NAME, RIA_TILE_M (out-features), RIA_TILE_N (tokens), RIA_CLUSTER_M,
//   RIA_PINGPONG 0 or 1 (Hopper only. 1: two consumer warpgroups on alternating tiles; 0: both on one),
//   RIA_STREAM_K 0 or 1 (K may be divided among thread blocks),
//   RIA_FP8 0 or 1 (Hopper only: W and x are e4m3, with one scale per out-feature and per token).
// One file has both outputs: the second adds little to the time it takes to compile.
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

#include "interface.h"
#include "metadata.h"
#if RIA_FP8
#include "scaled_epilogue.h"
#endif

namespace ria {
namespace {

constexpr int kValueBits = RIA_FP8 ? 8 : 16;
constexpr int kTileShapeK = kTileK<kValueBits>;  // 256 bytes of x either way

using TileShape = cute::Shape<cute::Int<RIA_TILE_M>, cute::Int<RIA_TILE_N>, cute::Int<kTileShapeK>>;
using ClusterShape = cute::Shape<cute::Int<RIA_CLUSTER_M>, cute::_1, cute::_1>;

#if RIA_FAMILY == 90
using Arch = cutlass::arch::Sm90;
using EpilogueClass = cutlass::arch::OpClassTensorOp;
#if RIA_PINGPONG
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
#else
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#endif
using DefaultScheduler = cutlass::gemm::PersistentScheduler;
#else
using Arch = cutlass::arch::Sm100;
using EpilogueClass = cutlass::arch::OpClassSparseTensorOp;
using MainloopSchedule = cutlass::gemm::KernelSparseTmaWarpSpecialized1SmSm100;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized1Sm;
using DefaultScheduler = void;
#endif

using Scheduler = cute::conditional_t<RIA_STREAM_K != 0, cutlass::gemm::StreamKScheduler, DefaultScheduler>;

// In elements: TMA needs 16 bytes.
constexpr int kInputAlignment = 128 / kValueBits, kOutputAlignment = 8;

// With fp8, the main loop promotes the tensor cores' sums to separate fp32 registers after every tile of K: Hopper's
// fp8 instructions reportedly keep only about 14 bits of a sum, and over thousands of channels the error would grow.
// CUTLASS's "FP8FastAccum" schedules skip the promotion.
template <class Output>
struct SparseLinear {
#if RIA_FP8
  using Element = cutlass::float_e4m3_t;
  using Fusion = typename ScaledEpilogue<TileShape, Output>::Operation;
#else
  using Element = Output;
  using Fusion = cutlass::epilogue::fusion::LinCombPerRowBias<Output, float, Output, void, float>;
#endif

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, EpilogueClass, TileShape, ClusterShape, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, kOutputAlignment, Output, cutlass::layout::ColumnMajor, kOutputAlignment,
      EpilogueSchedule, Fusion>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, 2 * kInputAlignment, Element,
      cutlass::layout::ColumnMajor, kInputAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Config = typename Mainloop::SparseConfig;

  static_assert(cute::is_same_v<typename Config::TensorEAtom, typename SparseConfig<kValueBits>::TensorEAtom>,
                "the kernel's metadata layout is not the one that metadata.h writes");
  static_assert(sizeof(typename Mainloop::ElementE) == 1);

  static typename Kernel::Arguments arguments(Problem const& p) {
    auto const sizes = cute::make_shape(p.out_features, p.tokens, p.in_features, 1);
    typename Kernel::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = sizes;
    args.mainloop.ptr_A = static_cast<Element const*>(p.values);
    args.mainloop.layout_a = Config::fill_layoutA(sizes);
    args.mainloop.ptr_B = static_cast<Element const*>(p.x);
    cute::get<0>(args.mainloop.dB) = p.in_features;
    args.mainloop.ptr_E = static_cast<typename Mainloop::ElementE const*>(p.metadata);
    args.mainloop.layout_e = Config::fill_layoutE(sizes);
#if RIA_FP8
    args.mainloop.mma_promotion_interval = kTileShapeK / 64;  // counts instructions, each of 64 channels
    ScaledEpilogue<TileShape, Output>::fill(args.epilogue.thread, p);
#else
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = 0.0f;
    args.epilogue.thread.bias_ptr = static_cast<Output const*>(p.bias);
#endif
    args.epilogue.ptr_D = static_cast<Output*>(p.y);
    cute::get<1>(args.epilogue.dD) = p.out_features;
    args.hw_info.device_id = p.device;
    args.hw_info.sm_count = p.num_sms;
#if RIA_STREAM_K
    using Mode = cute::remove_cvref_t<decltype(args.scheduler.decomposition_mode)>;
    int const steps = (p.in_features + kTileShapeK - 1) / kTileShapeK;
    args.scheduler.splits = p.split_k > steps ? steps : p.split_k > 1 ? p.split_k : 1;
    args.scheduler.decomposition_mode = p.split_k == kStreamK        ? Mode::StreamK
                                        : p.split_k == kDataParallel ? Mode::DataParallel
                                        : p.split_k > 1              ? Mode::SplitK
                                                                     : Mode::Heuristic;
#endif
    return args;
  }

  static bool can_implement(Problem const& p) {
    if (p.out_features % kOutputAlignment || p.in_features % (2 * kInputAlignment)) return false;
    return Gemm::can_implement(arguments(p)) == cutlass::Status::kSuccess;
  }

  static size_t workspace_bytes(Problem const& p) { return Gemm::get_workspace_size(arguments(p)); }

  static Result run(Problem const& p) {
    if (!can_implement(p)) return kNotSupported;
    auto args = arguments(p);
    // The same layout, but padded to the K of a tile, which can_implement() does not know.
    args.mainloop.layout_e = MetadataLayout<kValueBits>(p.out_features, p.in_features).layout;
    if (Gemm::get_workspace_size(args) > p.workspace_bytes - kCounterBytes) return kWorkspaceTooSmall;
    auto const stream = static_cast<cudaStream_t>(p.stream);
    Gemm gemm;
    auto status = gemm.initialize(args, static_cast<uint8_t*>(p.workspace) + kCounterBytes, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status == cutlass::Status::kSuccess) return kOk;
    // CUTLASS does not report launch errors. It clears most of them; only sticky ones are left to see here.
    cudaError_t const error = cudaPeekAtLastError();
    return cuda_error(error == cudaSuccess ? cutlassGetStatusString(status) : cudaGetErrorString(error));
  }
};

constexpr Operands kOperands = RIA_FP8 ? kFloat8 : k16Bits;

bool can_implement(Problem const& p) {
  if (operands_of(p.data_type) != kOperands) return false;
  return gives_bfloat16(p.data_type) ? SparseLinear<cutlass::bfloat16_t>::can_implement(p)
                                     : SparseLinear<cutlass::half_t>::can_implement(p);
}

// Both outputs need the same workspace.
size_t workspace_bytes(Problem const& p) { return SparseLinear<cutlass::bfloat16_t>::workspace_bytes(p); }

Result run(Problem const& p) {
  if (operands_of(p.data_type) != kOperands) return kNotSupported;
  return gives_bfloat16(p.data_type) ? SparseLinear<cutlass::bfloat16_t>::run(p)
                                     : SparseLinear<cutlass::half_t>::run(p);
}

[[maybe_unused]] bool const added = add_tile({RIA_TILE_NAME, can_implement, workspace_bytes, run});

}  // namespace
}  // namespace ria
