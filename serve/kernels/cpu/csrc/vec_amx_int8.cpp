// AMX with int8 tiles, and AVX-512 to expand weights into them. Few tokens take AVX-512 VNNI.
#include "amx_int8.h"

const ria::Int8Kernels ria::kAmxInt8Activations = {amx_int8_kernels_by_scales<8>(), amx_int8_kernels_by_scales<4>(),
                                                   quantize_token<Avx512VnniTraits, 0>};
