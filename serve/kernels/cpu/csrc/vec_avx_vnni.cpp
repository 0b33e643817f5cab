// AVX2 and AVX-VNNI: int8 activations on machines without AVX-512.
#include "ymm_int8.h"

const ria::Int8Kernels ria::kAvxVnniInt8 = int8_kernels<YmmInt8Traits>();
