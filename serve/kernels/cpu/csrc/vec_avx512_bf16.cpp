// AVX-512 with BF16 and VBMI: one dot-product instruction multiplies a row's pair of weights by its two activations.
#include "avx512_bf16.h"

const ria::Kernels ria::kAvx512Bf16 = {row_kernel<Avx512Bf16Traits<Dtype::bfloat16>>()};
const ria::Kernels ria::kAvx512Int8 = {row_kernel<Avx512Bf16Traits<Dtype::int8>>()};
const ria::Kernels ria::kAvx512Int4 = {row_kernel<Avx512Bf16Traits<Dtype::int4>>()};
const ria::Kernels ria::kAvx512GroupedInt8 = {row_kernel<Avx512Bf16Traits<Dtype::int8, true>>()};
const ria::Kernels ria::kAvx512GroupedInt4 = {row_kernel<Avx512Bf16Traits<Dtype::int4, true>>()};
