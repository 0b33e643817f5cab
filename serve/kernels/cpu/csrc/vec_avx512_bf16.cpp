// AVX-512 with BF16 and VBMI: one dot-product instruction multiplies a row's pair of weights by its two activations.
#include "avx512_bf16.h"

namespace {

template <int64_t V>
constexpr Products bf16_products() {
  return {{{row_kernel<Avx512Bf16Traits<Dtype::bfloat16, V>>()},
           {},
           {},
           {row_kernel<Avx512Bf16Traits<Dtype::int8, V>>()},
           {row_kernel<Avx512Bf16Traits<Dtype::int4, V>>()}},
          {{},
           {},
           {},
           {row_kernel<Avx512Bf16Traits<Dtype::int8, V, true>>()},
           {row_kernel<Avx512Bf16Traits<Dtype::int4, V, true>>()}}};
}

}  // namespace

const ria::Products ria::kAvx512Bf16 = bf16_products<1>(), ria::kAvx512Bf16Of16 = bf16_products<4>();
