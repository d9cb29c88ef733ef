// Plain C that is inlined into functions of each level of instructions (isa.h): the compiler makes vectors of its loops.
#ifndef TOLKERNELS_VALUES_H
#define TOLKERNELS_VALUES_H

#include "isa.h"
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

// Bytes of a row or cache as they lie there, at any address.
typedef uint16_t __attribute__((aligned(1), may_alias)) Bits16;

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

#endif
