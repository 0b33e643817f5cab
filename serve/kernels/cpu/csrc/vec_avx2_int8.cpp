// AVX2, FMA and F16C: int8 activations.
#include "ymm_int8.h"

const ria::Int8Kernels ria::kAvx2Int8 = int8_kernels<YmmInt8Traits>(ria::kAvx2Int8Of16);
const ria::Int8Products ria::kAvx2Int8Of16 = int8_products<YmmOf16Traits>();
