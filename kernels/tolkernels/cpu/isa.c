#define _GNU_SOURCE
#include "isa.h"
#include <sys/mman.h>

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

void tk_huge_pages(void *start, long bytes) {
    const uintptr_t first = ((uintptr_t)start + 4095) / 4096 * 4096, end = ((uintptr_t)start + bytes) / 4096 * 4096;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);  // a wish; a kernel without them refuses
}
