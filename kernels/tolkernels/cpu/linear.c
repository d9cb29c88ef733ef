// y = x W^T (+ residual): float32 activations, and weights of five encodings.
//
// Weights lie in panels of 32 outputs, so that a vector load has the same k, or the same few, of many outputs, and a
// panel is read in one run:
//   FLOAT32, FLOAT16   [N / 32][K][32]
//   BFLOAT16           [N / 32][K / 2][32][2]   two k in a 32-bit lane: a shift and a mask make floats of them
//   INT8               [N / 32][K / 2][32][2]   float scales [N]
//   INT4               [N / 32][K / 8][32]      eight k in a 32-bit lane, as value + 8, lowest bits first in the order
//                                               0 2 4 6 1 3 5 7; bfloat16 scales [N / 32][K / 32][32]
// N is padded with zeros to whole panels.
//
// With float weights activations stay float32: AVX512-BF16's dot product does 45 G multiply-adds a second on a core of
// Sapphire Rapids, the float32 FMA 91. With integer weights a token's activations are rounded to 16-bit integers, and
// products of 16-bit integers are summed exactly (VNNI: 195 G): an error of 1/65,534 of the token's largest value.
#include <stdlib.h>

#include "values.h"

enum { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4, ENCODINGS };
enum { PANEL = 32, GROUP = 32, MOST_TOKENS = 12 };
// Products of |int16| <= 32767 and |int8| <= 127 that an int32 holds in any case.
enum { EXACT_RUN = 512 };
// Values of a token that are rounded at once: whole groups.
enum { ROUNDED = 512 };
// Bytes in front of a pass over the weights that they are fetched into the L2 cache. Of distances from 512 to 24,576
// this was the fastest for all encodings (within 5% of it from 6,144 on), and L1 as the target was slower. Without it a
// core reads at half to two thirds of the rate of a plain sum over the same bytes, with it at .83 to .91.
enum { AHEAD = 12288 };
// Panels that a thread keeps in its L2 cache while all of a prompt's tokens go by; 256 KiB and 1 MiB were as fast.
// Writing them down as floats first was not faster either (AVX512; with AVX2 by a tenth, from 128 tokens on).
enum { KEPT_BYTES = 512 * 1024 };

typedef struct {
    const uint8_t *data;
    const uint16_t *group_scales;  // INT4 alone
    const float *row_scales;       // INT8 alone
    long outputs, inputs;          // N without the padding, K
    long passes;                   // how often each panel is read: blocks of tokens. Set by `run`
} Weight;

// The tiles of a level of instructions: (weight, first output, packed tokens, what to fetch meanwhile, sums).
typedef void Tile(const Weight *, long, const void *, const char *, float *);
typedef struct {
    int max_tokens, outputs;
    Tile *tile[ENCODINGS][MOST_TOKENS];
} Level;

INLINE int is_integer(int encoding) { return encoding == INT8 || encoding == INT4; }

// Inputs whose weights are read together, and the bytes of a panel that hold them.
INLINE int unit_of(int encoding) { return encoding == INT4 ? 8 : 2; }
INLINE long unit_bytes(int encoding) {
    return PANEL * (encoding == FLOAT32 ? 8 : encoding == INT8 ? 2 : 4);
}
INLINE long panel_bytes(int encoding, long inputs) { return inputs / unit_of(encoding) * unit_bytes(encoding); }
INLINE int lane_bytes(int encoding) { return encoding == FLOAT16 || encoding == INT8 ? 2 : 4; }

INLINE const uint8_t *weights_at(const Weight *weight, int encoding, long output) {
    const long panel = panel_bytes(encoding, weight->inputs);
    return weight->data + output / PANEL * panel + output % PANEL * lane_bytes(encoding);
}

INLINE const uint16_t *scales_at(const Weight *weight, long output, long input) {
    return weight->group_scales + (output / PANEL * (weight->inputs / GROUP) + input / GROUP) * PANEL + output % PANEL;
}

// One unit's share of what comes next: `step` bytes, in whole cache lines from `ahead` on. Where passes have less than
// a line each, several ask for the same one.
INLINE void fetch_ahead(const char *ahead, long bytes, long step) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    if (bytes > 64 && step > 64) _mm_prefetch(ahead + 64, _MM_HINT_T1);
    if (bytes > 128 && step > 128) _mm_prefetch(ahead + 128, _MM_HINT_T1);
    if (bytes > 192 && step > 192) _mm_prefetch(ahead + 192, _MM_HINT_T1);
}

#define NAME(x) avx512_##x
#define TARGET AVX512
#define VF __m512
#define VI __m512i
#define VL 16
#define MAX_TOKENS 12
INLINE TARGET VF NAME(zero)(void) { return _mm512_setzero_ps(); }
INLINE TARGET VI NAME(zero_int)(void) { return _mm512_setzero_si512(); }
INLINE TARGET VF NAME(one)(void) { return _mm512_set1_ps(1); }
INLINE TARGET VF NAME(spread)(const float *p) { return _mm512_set1_ps(*p); }
INLINE TARGET VI NAME(spread_int)(const int32_t *p) { return _mm512_set1_epi32(*p); }
INLINE TARGET VF NAME(load)(const float *p) { return _mm512_loadu_ps(p); }
INLINE TARGET void NAME(store)(float *p, VF v) { _mm512_storeu_ps(p, v); }
INLINE TARGET VF NAME(fma)(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE TARGET VI NAME(dot)(VI a, VI b, VI c) { return _mm512_dpwssd_epi32(c, a, b); }
INLINE TARGET VF NAME(to_floats)(VI v) { return _mm512_cvtepi32_ps(v); }
INLINE TARGET VF NAME(scale)(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE TARGET VF NAME(floats)(int encoding, const uint8_t *w, int k) {
    if (encoding == FLOAT32) return _mm512_loadu_ps(w + k * PANEL * 4);
    if (encoding == FLOAT16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(w + k * PANEL * 2)));
    const VI lanes = _mm512_loadu_si512(w);
    return _mm512_castsi512_ps(k ? _mm512_and_si512(lanes, _mm512_set1_epi32(~0xffff)) : _mm512_slli_epi32(lanes, 16));
}
INLINE TARGET VI NAME(pairs)(int encoding, const uint8_t *w, int pair) {
    if (encoding == INT8) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)w));
    return _mm512_and_si512(_mm512_srli_epi32(_mm512_loadu_si512(w), 4 * pair), _mm512_set1_epi32(0xf000f));
}
#include "linear_tiles.h"

#define NAME(x) avx2_##x
#define TARGET AVX2
#define VF __m256
#define VI __m256i
#define VL 8
#define MAX_TOKENS 6
INLINE TARGET VF NAME(zero)(void) { return _mm256_setzero_ps(); }
INLINE TARGET VI NAME(zero_int)(void) { return _mm256_setzero_si256(); }
INLINE TARGET VF NAME(one)(void) { return _mm256_set1_ps(1); }
INLINE TARGET VF NAME(spread)(const float *p) { return _mm256_set1_ps(*p); }
INLINE TARGET VI NAME(spread_int)(const int32_t *p) { return _mm256_set1_epi32(*p); }
INLINE TARGET VF NAME(load)(const float *p) { return _mm256_loadu_ps(p); }
INLINE TARGET void NAME(store)(float *p, VF v) { _mm256_storeu_ps(p, v); }
INLINE TARGET VF NAME(fma)(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INLINE TARGET VI NAME(dot)(VI a, VI b, VI c) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
INLINE TARGET VF NAME(to_floats)(VI v) { return _mm256_cvtepi32_ps(v); }
INLINE TARGET VF NAME(scale)(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE TARGET VF NAME(floats)(int encoding, const uint8_t *w, int k) {
    if (encoding == FLOAT32) return _mm256_loadu_ps((const float *)(w + k * PANEL * 4));
    if (encoding == FLOAT16) return _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + k * PANEL * 2)));
    const VI lanes = _mm256_loadu_si256((const void *)w);
    return _mm256_castsi256_ps(k ? _mm256_and_si256(lanes, _mm256_set1_epi32(~0xffff)) : _mm256_slli_epi32(lanes, 16));
}
INLINE TARGET VI NAME(pairs)(int encoding, const uint8_t *w, int pair) {
    if (encoding == INT8) return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w));
    const VI lanes = _mm256_loadu_si256((const void *)w);
    return _mm256_and_si256(_mm256_srli_epi32(lanes, 4 * pair), _mm256_set1_epi32(0xf000f));
}
#include "linear_tiles.h"

typedef struct {
    const Level *level;
    Weight weight;
    const float *x, *residual;
    float *out;      // or, instead,
    uint64_t *best;  // [tokens]: rank_of the best output, 0 at first
    int encoding;
    long tokens;
    int32_t *packed;    // blocks of tokens, each [packed_length(...)][tokens of the block] 32-bit words
    float *x_scales;    // [tokens]; integer weights alone
    long group, groups; // outputs of a group, a multiple of PANEL, and how many there are
} Call;

// 32-bit words of a packed token.
static long packed_length(int encoding, long inputs) {
    return encoding == INT4 ? inputs / 2 + inputs / GROUP : encoding == INT8 ? inputs / 2 : inputs;
}

// Tokens are cut into blocks as equal as can be. The first token of block b; that of b + 1 is its end.
static long block_start(const Call *call, long b) { return call->tokens * b / call->weight.passes; }

// The largest magnitude; a NaN or an infinity is larger than all.
AVX2 static float largest_of(const float *x, long inputs) {
    uint32_t largest = 0;
    for (long k = 0; k < inputs; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;  // in the order of magnitudes, NaN above all
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

// A token as 16-bit integers, two to a word, and for INT4 then -8 times each group's sum. Words lie `step` apart.
// Returns what a one is worth.
AVX2 static float pack_integers(const float *x, long inputs, int encoding, int32_t *to, long step) {
    const float magnitude = largest_of(x, inputs), inverse = magnitude > 1e-30f ? 32767 / magnitude : 0;
    int32_t *sums = to + inputs / 2 * step;
    for (long start = 0; start < inputs; start += ROUNDED) {
        const long count = inputs - start < ROUNDED ? inputs - start : ROUNDED;
        int16_t rounded[ROUNDED] __attribute__((aligned(64)));
        for (long k = 0; k < count; k++)  // plus 1.5 * 2^23: the rounded value is in the lowest bits
            rounded[k] = (int16_t)bits_of_float(x[start + k] * inverse + 12582912);
        for (long k = 0; k < count; k += 2, to += step) memcpy(to, rounded + k, 4);
        for (long g = 0; encoding == INT4 && g < count; g += GROUP, sums += step) {
            int32_t sum = 0;
            for (int k = 0; k < GROUP; k++) sum += rounded[g + k];
            *sums = -8 * sum;
        }
    }
    return magnitude / 32767;
}

static void pack_block(const Call *call, long b) {
    const int encoding = call->encoding;
    const long start = block_start(call, b), count = block_start(call, b + 1) - start, inputs = call->weight.inputs;
    int32_t *const block = call->packed + start * packed_length(encoding, inputs);
    for (long t = 0; t < count; t++) {
        const float *x = call->x + (start + t) * inputs;
        if (is_integer(encoding)) {
            call->x_scales[start + t] = pack_integers(x, inputs, encoding, block + t, count);
            continue;
        }
        for (long k = 0; k < inputs; k++) memcpy(block + t + k * count, x + k, 4);
    }
}

// The outputs of a token in a tile: `first` and those after it, `count` of them.
INLINE void finish(const Call *call, long t, long first, long count, const float *sums, float *out) {
    const float scale = is_integer(call->encoding) ? call->x_scales[t] : 1;
    const float *scales = call->encoding == INT8 ? call->weight.row_scales + first : 0;
    for (long n = 0; n < count; n++) out[n] = sums[n] * scale * (scales ? scales[n] : 1);
}

// In the order of values, and of equal ones the lower output's is larger. NaN is above all; the two zeros are equal.
INLINE uint64_t rank_of(float value, long output) {
    const uint32_t bits = bits_of_float(value + 0.0f);
    const uint32_t order = value != value ? UINT32_MAX : bits >> 31 ? ~bits : bits | 0x80000000;
    return (uint64_t)order << 32 | (uint32_t)~output;
}

INLINE float value_of(uint64_t rank) {
    const uint32_t order = rank >> 32;
    return float_of(order >> 31 ? order & 0x7fffffff : ~order);
}

// Hardly any tile has a token's best output so far, so all of it is compared before anything is ranked. A rank of 0,
// before the first tile, is of a NaN, which nothing is below.
AVX2 static void rank_token(uint64_t *best, const float *values, long first, long count) {
    uint64_t known = __atomic_load_n(best, __ATOMIC_RELAXED), rank = known;
    const float least = value_of(known);
    int candidates = 0;
    for (long n = 0; n < count; n++) candidates |= !(values[n] < least);
    if (!candidates) return;
    for (long n = 0; n < count; n++) {
        const uint64_t other = rank_of(values[n], first + n);
        rank = other > rank ? other : rank;
    }
    while (rank > known && !__atomic_compare_exchange_n(best, &known, rank, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static void finish_tile(const Call *call, long b, long first, const float *sums) {
    const long start = block_start(call, b), end = block_start(call, b + 1), all = call->weight.outputs;
    const long count = all - first < call->level->outputs ? all - first : call->level->outputs;
    for (long t = start; t < end; t++, sums += call->level->outputs) {
        if (call->best) {
            float values[PANEL];
            finish(call, t, first, count, sums, values);
            rank_token(call->best + t, values, first, count);
            continue;
        }
        float *out = call->out + t * all + first;
        finish(call, t, first, count, sums, out);
        const float *residual = call->residual ? call->residual + t * all + first : 0;
        for (long n = 0; residual && n < count; n++) out[n] += residual[n];
    }
}

// A group of outputs for all tokens. Several passes over a group share out the fetching of the next one.
static void run_group(const Call *call, long g) {
    float sums[MOST_TOKENS * PANEL] __attribute__((aligned(64)));
    const Level *level = call->level;
    const long inputs = call->weight.inputs, first = g * call->group, passes = call->weight.passes;
    const long end = first + call->group < call->weight.outputs ? first + call->group : call->weight.outputs;
    const long bytes = panel_bytes(call->encoding, inputs);
    for (long b = 0; b < passes; b++) {
        const long start = block_start(call, b), count = block_start(call, b + 1) - start;
        const int32_t *x = call->packed + start * packed_length(call->encoding, inputs);
        const long ahead = passes == 1 ? AHEAD : call->group / PANEL * bytes + b * bytes / passes;
        for (long n = first; n < end; n += level->outputs) {
            const uint8_t *weights = weights_at(&call->weight, call->encoding, n);
            level->tile[call->encoding][count - 1](&call->weight, n, x, (const char *)weights + ahead, sums);
            finish_tile(call, b, n, sums);
        }
    }
}

// Groups, and memory for what a call needs beside its arguments. Returns 0, or 1 if there is none.
static int set_up(Call *call) {
    call->weight.passes = (call->tokens + call->level->max_tokens - 1) / call->level->max_tokens;
    const long inputs = call->weight.inputs, kept = KEPT_BYTES / panel_bytes(call->encoding, inputs);
    call->group = PANEL * (call->weight.passes > 2 && kept > 1 ? kept : 1);
    call->groups = (call->weight.outputs + call->group - 1) / call->group;
    call->packed = (int32_t *)call->x;  // a single token of floats is packed as it is
    if (call->tokens > 1 || is_integer(call->encoding))
        call->packed = malloc(call->tokens * packed_length(call->encoding, inputs) * 4);
    if (is_integer(call->encoding)) call->x_scales = malloc(call->tokens * 4);
    return !call->packed || (is_integer(call->encoding) && !call->x_scales);
}

static int run(Call call, int threads) {
    if (!call.tokens) return 0;
    const int failed = set_up(&call);
    // Neighbours in turn, for the fetching; eight turns for each thread, because another process may hold one up.
    const int turn = call.groups / (8 * threads) + 1;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            if ((const float *)call.packed != call.x) {
#pragma omp for schedule(static)
                for (long b = 0; b < call.weight.passes; b++) pack_block(&call, b);
            }
#pragma omp for schedule(dynamic, turn)
            for (long g = 0; g < call.groups; g++) run_group(&call, g);
        }
    }
    if ((const float *)call.packed != call.x) free(call.packed);
    free(call.x_scales);
    return failed;
}

static const Level *level_of(int isa) { return isa >= ISA_AVX512 ? &avx512_level : &avx2_level; }

// x [T, K], out [T, N] and residual [T, N] (or NULL) are float32 and contiguous. Returns 0, or 1 without memory.
int tk_linear(const uint8_t *data, const uint16_t *group_scales, const float *row_scales, const float *x,
              const float *residual, float *out, long tokens, long outputs, long inputs, int encoding, int isa,
              int threads) {
    const Call call = {.level = level_of(isa), .weight = {data, group_scales, row_scales, outputs, inputs, 0}, .x = x,
                       .residual = residual, .out = out, .tokens = tokens, .encoding = encoding};
    return run(call, threads);
}

// The output with the largest value of each token, the lowest of equal ones, into best [T]; a NaN counts as largest.
int tk_linear_argmax(const uint8_t *data, const uint16_t *group_scales, const float *row_scales, const float *x,
                     int64_t *best, long tokens, long outputs, long inputs, int encoding, int isa, int threads) {
    const Call call = {.level = level_of(isa), .weight = {data, group_scales, row_scales, outputs, inputs, 0}, .x = x,
                       .best = (uint64_t *)best, .tokens = tokens, .encoding = encoding};
    memset(best, 0, tokens * sizeof *best);
    const int failed = run(call, threads);
    for (long t = 0; t < tokens; t++) best[t] = (uint32_t)~call.best[t];
    return failed;
}
