// AVX2 and AVX-VNNI: int8 activations on machines without AVX-512.
#include "ymm_int8.h"

const ria::Int8Kernels ria::kAvxVnniInt8 = int8_kernels<YmmInt8Traits>(ria::kAvxVnniOf16);
const ria::Int8Products ria::kAvxVnniOf16 = int8_products<YmmOf16Traits>();
