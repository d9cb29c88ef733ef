// What every source here shares: which instructions a function may use, and how the machine is asked for them.
#ifndef TOLKERNELS_ISA_H
#define TOLKERNELS_ISA_H

#include <immintrin.h>
#include <stdint.h>

// Nothing is compiled for the building machine: each function names its instructions and is chosen when it is called.
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

// Levels of instructions, each including those below it. `tk_isa()` is the machine's; a caller may pass a lower one.
enum { ISA_NONE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

int tk_isa(void);

// Of a library and of the Python that calls it (cpu.py), which must be the same: a library may be left over from another
// version. Counts up with every change of a function's name or parameters, or of how weights, rows or caches lie.
enum { INTERFACE = 3 };

int tk_interface(void);

#endif
