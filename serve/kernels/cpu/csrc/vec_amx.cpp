// AMX with bfloat16 tiles, and AVX-512 to expand weights into them.
#include "amx_bf16.h"

const ria::Kernels ria::kAmxBf16 = amx_bf16_kernels<Dtype::bfloat16>();
const ria::Kernels ria::kAmxInt8 = amx_bf16_kernels<Dtype::int8>();
const ria::Kernels ria::kAmxInt4 = amx_bf16_kernels<Dtype::int4>();
const ria::Kernels ria::kAmxGroupedInt8 = amx_bf16_kernels<Dtype::int8, true>();
const ria::Kernels ria::kAmxGroupedInt4 = amx_bf16_kernels<Dtype::int4, true>();
