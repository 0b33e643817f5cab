// The epilogue for e4m3 operands: y = sums * token scale * weight scale + bias. Hopper only.
#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"

#include "interface.h"

namespace ria {

// The epilogue's visitor tree over y^T, whose rows are out-features and whose columns are tokens. It computes in fp32
// and rounds once, at the end.
template <class TileShape, class Output>
struct ScaledEpilogue {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  template <class Element>
  using PerRow = cutlass::epilogue::fusion::Sm90ColBroadcast<0, TileShape, Element, float>;
  using PerColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, float>;

  template <template <class> class Function, class Result, class... Operands>
  using Apply =
      cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90Compute<Function, Result, float, kRound>,
                                         Operands...>;

  using Scaled = Apply<cutlass::multiplies, float, PerColumn, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Operation = Apply<cutlass::homogeneous_multiply_add, Output, PerRow<float>, Scaled, PerRow<Output>>;

  // Sets the operands' addresses in the tree's arguments, which CUTLASS numbers in the order of the operands.
  static void fill(typename Operation::Arguments& arguments, Problem const& p) {
    arguments.op_0.ptr_col = static_cast<float const*>(p.weight_scales);
    arguments.op_1.op_0.ptr_row = static_cast<float const*>(p.token_scales);
    arguments.op_2.ptr_col = static_cast<Output const*>(p.bias);  // null reads as zeros
  }
};

}  // namespace ria
