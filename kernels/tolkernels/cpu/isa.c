#include "isa.h"

int tk_interface(void) { return INTERFACE; }

int tk_isa(void) {
    __builtin_cpu_init();
    // Every processor with AVX2 has F16C.
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return ISA_NONE;
    // One level of AVX512: the first processors with it, which lack VNNI, are no worse off with AVX2 at reading weights.
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512vnni");
    return avx512 ? ISA_AVX512 : ISA_AVX2;
}
