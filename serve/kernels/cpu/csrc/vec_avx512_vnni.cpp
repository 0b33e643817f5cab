// AVX-512 F, BW, VL, DQ and VNNI: int8 activations. One instruction multiplies four of a row's weights by its four
// activations.
#include "avx512_vnni.h"

const ria::Int8Kernels ria::kAvx512VnniInt8 = int8_kernels<Avx512VnniTraits>(ria::kAvx512Vbmi2Of16);
