// AMX with int8 tiles, and AVX-512 to expand weights into them. Scales of groups and few tokens take AVX-512 VNNI.
#include "amx_int8.h"

const ria::Int8Kernels ria::kAmxInt8Activations = {amx_int8_kernels<8>(12), amx_int8_kernels<4>(12),
                                                   int8_kernel<Avx512VnniTraits, 8, true>(),
                                                   int8_kernel<Avx512VnniTraits, 4, true>()};
