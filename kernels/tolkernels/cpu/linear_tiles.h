// The inner loops of linear.c, written once and included for each level of instructions, with
//   NAME(x)      the name of x at this level
//   TARGET       the attribute that allows its instructions
//   VL           floats in a vector: 16 or 8
//   MAX_TOKENS   tokens of a tile: as many as leave registers for the weights
//   VF, VI       vectors of floats and of int32, and operations on them that linear.c defines
// and undefines most of them at its end.
//
// A tile is two vectors of outputs by 1 to MAX_TOKENS tokens. Each sum is one chain in the order of k, so a token's
// result depends neither on the tokens beside it nor on the number of threads.

#define COLUMNS 2
#define FORCE INLINE TARGET
#define EACH_COLUMN _Pragma("GCC unroll 2") for (int c = 0; c < COLUMNS; c++)
#define EACH_TOKEN _Pragma("GCC unroll 12") for (int t = 0; t < tokens; t++)

// x: [K][tokens] floats. sums: [tokens][COLUMNS * VL].
FORCE void NAME(float_tile)(int encoding, int tokens, const Weight *weight, long first, const void *packed,
                            const char *ahead, float *sums) {
    const float *x = packed;
    const long bytes = unit_bytes(encoding), step = bytes / weight->passes;
    const uint8_t *w[COLUMNS];
    VF sum[MAX_TOKENS][COLUMNS];
    EACH_COLUMN {
        w[c] = weights_at(weight, encoding, first + c * VL);
        EACH_TOKEN sum[t][c] = NAME(zero)();
    }
    for (long k = 0; k < weight->inputs; k += 2, ahead += step) {
        fetch_ahead(ahead, bytes, step);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            VF values[COLUMNS];
            EACH_COLUMN values[c] = NAME(floats)(encoding, w[c], j);
            EACH_TOKEN {
                const VF spread = NAME(spread)(x + j * tokens + t);
                EACH_COLUMN sum[t][c] = NAME(fma)(spread, values[c], sum[t][c]);
            }
        }
        x += 2 * tokens;
        EACH_COLUMN w[c] += bytes;
    }
    EACH_TOKEN EACH_COLUMN NAME(store)(sums + (t * COLUMNS + c) * VL, sum[t][c]);
}

// x: [K / 2][tokens] pairs of int16, and for INT4 [K / GROUP][tokens] int32 with -8 times the sum of a group's values.
FORCE void NAME(integer_tile)(int encoding, int tokens, const Weight *weight, long first, const void *packed,
                              const char *ahead, float *sums) {
    const int32_t *x = packed, *offsets = x + weight->inputs / 2 * tokens;
    const long bytes = unit_bytes(encoding), step = bytes / weight->passes;
    const int unit = unit_of(encoding), run = encoding == INT4 ? GROUP : EXACT_RUN;
    const uint8_t *w[COLUMNS];
    VI sum[MAX_TOKENS][COLUMNS];
    EACH_COLUMN w[c] = weights_at(weight, encoding, first + c * VL);
    EACH_TOKEN EACH_COLUMN NAME(store)(sums + (t * COLUMNS + c) * VL, NAME(zero)());
    for (long start = 0; start < weight->inputs; start += run) {
        const long end = start + run < weight->inputs ? start + run : weight->inputs;
        EACH_TOKEN EACH_COLUMN sum[t][c] = encoding == INT4 ? NAME(spread_int)(offsets + t) : NAME(zero_int)();
        offsets += tokens;
        for (long k = start; k < end; k += unit, ahead += step) {
            fetch_ahead(ahead, bytes, step);
#pragma GCC unroll 4
            for (int j = 0; j < unit / 2; j++) {
                VI pairs[COLUMNS];
                EACH_COLUMN pairs[c] = NAME(pairs)(encoding, w[c], j);
                EACH_TOKEN {
                    const VI spread = NAME(spread_int)(x + j * tokens + t);
                    EACH_COLUMN sum[t][c] = NAME(dot)(spread, pairs[c], sum[t][c]);
                }
            }
            x += unit / 2 * tokens;
            EACH_COLUMN w[c] += bytes;
        }
        // Without this gcc 12 carries each of `sum` through the inner loop twice, as two types of vector and once in
        // memory, and those of `sums` through the outer loop in registers that are not there.
        EACH_TOKEN EACH_COLUMN __asm__ volatile("" : "+v"(sum[t][c]) : : "memory");
        VF scale[COLUMNS];
        EACH_COLUMN scale[c] = encoding == INT4 ? NAME(scale)(scales_at(weight, first + c * VL, start)) : NAME(one)();
        EACH_TOKEN EACH_COLUMN {
            float *to = sums + (t * COLUMNS + c) * VL;
            NAME(store)(to, NAME(fma)(NAME(to_floats)(sum[t][c]), scale[c], NAME(load)(to)));
        }
    }
}

#define TILE(kind, e, t) \
    static TARGET void NAME(e##_##t)(const Weight *w, long first, const void *x, const char *ahead, float *sums) { \
        NAME(kind##_tile)(e, t, w, first, x, ahead, sums); \
    }
#define TILES(kind, e) \
    TILE(kind, e, 1) TILE(kind, e, 2) TILE(kind, e, 3) TILE(kind, e, 4) TILE(kind, e, 5) TILE(kind, e, 6) \
    MORE_TILES(kind, e)
#define LISTED(e) {NAME(e##_1), NAME(e##_2), NAME(e##_3), NAME(e##_4), NAME(e##_5), NAME(e##_6) MORE_LISTED(e)}
#if MAX_TOKENS == 12
#define MORE_TILES(kind, e) \
    TILE(kind, e, 7) TILE(kind, e, 8) TILE(kind, e, 9) TILE(kind, e, 10) TILE(kind, e, 11) TILE(kind, e, 12)
#define MORE_LISTED(e) , NAME(e##_7), NAME(e##_8), NAME(e##_9), NAME(e##_10), NAME(e##_11), NAME(e##_12)
#else
#define MORE_TILES(kind, e)
#define MORE_LISTED(e)
#endif

TILES(float, FLOAT32) TILES(float, FLOAT16) TILES(float, BFLOAT16) TILES(integer, INT8) TILES(integer, INT4)

static const Level NAME(level) = {
    .max_tokens = MAX_TOKENS,
    .outputs = COLUMNS * VL,
    .tile = {LISTED(FLOAT32), LISTED(FLOAT16), LISTED(BFLOAT16), LISTED(INT8), LISTED(INT4)},
};

#undef COLUMNS
#undef FORCE
#undef EACH_COLUMN
#undef EACH_TOKEN
#undef TILE
#undef TILES
#undef MORE_TILES
#undef LISTED
#undef MORE_LISTED
#undef NAME
#undef TARGET
#undef VF
#undef VI
#undef VL
#undef MAX_TOKENS
