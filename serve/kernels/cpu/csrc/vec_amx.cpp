// AMX with bfloat16 tiles, and AVX-512 to expand weights into them.
#include "amx_bf16.h"

const ria::Products ria::kAmxBf16 = amx_bf16_products<1>(), ria::kAmxBf16Of16 = amx_bf16_products<4>();
