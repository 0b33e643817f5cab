// AVX-512 F, BW, VL, DQ, VNNI and VBMI2: int8 activations and 8:16 matrices.
#include "avx512_vbmi2.h"

const ria::Int8Products ria::kAvx512Vbmi2Of16 = int8_products<Avx512Of16Traits>();
