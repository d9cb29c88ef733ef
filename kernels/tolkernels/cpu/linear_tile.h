// The inner loops of linear.c, written once and included for each level of instructions, with
//   NAME(x)      the name of x at this level
//   TARGET       the attribute that allows its instructions
//   VF, VL       a vector of floats, and how many it holds: 16 or 8
//   MAX_TOKENS   tokens of a tile: as many as leave registers for the weights
// and the operations NAME(zero), NAME(load), NAME(store), NAME(spread) (one float to all), NAME(fma), NAME(weight) (VL
// weights as floats) and NAME(scale) (VL bfloat16 scales). It undefines these at the end.
//
// A tile is COLUMNS vectors of outputs by 1 to MAX_TOKENS tokens. Each sum is one chain of fused multiply-adds in the
// order of k: a token's result depends neither on the tokens beside it nor on the number of threads.

#define COLUMNS 2
#define TILE_OUTPUTS (COLUMNS * VL)
#define FORCE static inline __attribute__((always_inline)) TARGET

// One unit of k: `unit` weights each of TILE_OUTPUTS outputs, x [unit][tokens].
FORCE void NAME(unit)(int encoding, int tokens, const uint8_t *const *w, const VF *scale, const float *x,
                      VF (*sum)[COLUMNS]) {
#pragma GCC unroll 8
    for (int k = 0; k < unit_of(encoding); k++) {
        VF weight[COLUMNS];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) weight[c] = NAME(weight)(encoding, w[c], k, scale[c]);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++) {
            VF value = NAME(spread)(x + k * tokens + t);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++) sum[t][c] = NAME(fma)(value, weight[c], sum[t][c]);
        }
    }
}

// sums [tokens][TILE_OUTPUTS]: x [K][tokens] with the outputs from `first` on.
FORCE void NAME(tile)(int encoding, int tokens, const Weight *weight, long first, const float *x, float *sums) {
    const int unit = unit_of(encoding);
    const uint8_t *w[COLUMNS];
    const uint16_t *scales[COLUMNS];
    VF sum[MAX_TOKENS][COLUMNS], scale[COLUMNS];
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS; c++) {
        w[c] = weights_at(weight, encoding, first + c * VL);
        scales[c] = encoding == INT4 ? scales_at(weight, first + c * VL) : 0;
        scale[c] = NAME(zero)();
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++) sum[t][c] = NAME(zero)();
    }
    for (long k = 0; k < weight->inputs; k += unit) {
        if (encoding == INT4 && k % GROUP == 0) {
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++) scale[c] = NAME(scale)(scales[c] + k / GROUP * PANEL);
        }
        NAME(unit)(encoding, tokens, w, scale, x, sum);
        x += unit * tokens;
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) w[c] += unit * PANEL * bits_of(encoding) / 8;
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) NAME(store)(sums + t * TILE_OUTPUTS + c * VL, sum[t][c]);
}

// The tile's weights as floats, in the layout of a FLOAT32 weight of TILE_OUTPUTS outputs.
FORCE void NAME(expand_as)(int encoding, const Weight *weight, long first, float *out) {
    const int unit = unit_of(encoding);
    for (int c = 0; c < COLUMNS; c++) {
        const uint8_t *w = weights_at(weight, encoding, first + c * VL);
        const uint16_t *scales = encoding == INT4 ? scales_at(weight, first + c * VL) : 0;
        float *to = out + (c * VL) / PANEL * PANEL * weight->inputs + (c * VL) % PANEL;
        VF scale = NAME(zero)();
        for (long k = 0; k < weight->inputs; k += unit) {
            if (encoding == INT4 && k % GROUP == 0) scale = NAME(scale)(scales + k / GROUP * PANEL);
#pragma GCC unroll 8
            for (int j = 0; j < unit; j++) NAME(store)(to + (k + j) * PANEL, NAME(weight)(encoding, w, j, scale));
            w += unit * PANEL * bits_of(encoding) / 8;
        }
    }
}

#define ONE(e, t) \
    static TARGET void NAME(tile_##e##_##t)(const Weight *weight, long first, const float *x, float *sums) { \
        NAME(tile)(e, t, weight, first, x, sums); \
    }
#define ALL(e) \
    static TARGET void NAME(expand_##e)(const Weight *weight, long first, float *out) { \
        NAME(expand_as)(e, weight, first, out); \
    } \
    ONE(e, 1) ONE(e, 2) ONE(e, 3) ONE(e, 4) ONE(e, 5) ONE(e, 6) MORE(e)
#define NAMES(e) {NAME(tile_##e##_1), NAME(tile_##e##_2), NAME(tile_##e##_3), NAME(tile_##e##_4), \
                  NAME(tile_##e##_5), NAME(tile_##e##_6) MORE_NAMES(e)}
#if VL == 16
#define MORE(e) ONE(e, 7) ONE(e, 8) ONE(e, 9) ONE(e, 10) ONE(e, 11) ONE(e, 12)
#define MORE_NAMES(e) , NAME(tile_##e##_7), NAME(tile_##e##_8), NAME(tile_##e##_9), NAME(tile_##e##_10), \
                      NAME(tile_##e##_11), NAME(tile_##e##_12)
#else
#define MORE(e)
#define MORE_NAMES(e)
#endif

ALL(FLOAT32) ALL(FLOAT16) ALL(BFLOAT16) ALL(INT8) ALL(INT4)

static const Level NAME(level) = {
    .max_tokens = MAX_TOKENS,
    .outputs = TILE_OUTPUTS,
    .expand = {NAME(expand_FLOAT32), NAME(expand_FLOAT16), NAME(expand_BFLOAT16), NAME(expand_INT8), NAME(expand_INT4)},
    .tile = {NAMES(FLOAT32), NAMES(FLOAT16), NAMES(BFLOAT16), NAMES(INT8), NAMES(INT4)},
};

#undef COLUMNS
#undef TILE_OUTPUTS
#undef FORCE
#undef ONE
#undef ALL
#undef NAMES
#undef MORE
#undef MORE_NAMES
#undef NAME
#undef TARGET
#undef VF
#undef VL
#undef MAX_TOKENS
