// y = x W^T (+ residual) with float32 activations and weights of five encodings.
//
// Weights lie in panels of 16 outputs, so that a load has the same k of all of them (or the same few):
//   FLOAT32, FLOAT16, INT8   [N / 16][K][16]
//   BFLOAT16                 [N / 16][K / 2][16][2]      two k in one 32-bit lane: a shift and a mask make floats of them
//   INT4                     [N / 16][K / 8][16][8]      eight k in one lane, the first in the lowest bits, plus 8;
//                            scales [N / 16][K / 32][16] bfloat16
// INT8 has a float scale per output [N]. N is padded with zeros to whole tiles (OUTPUT_MULTIPLE).
//
// Activations stay float32: where AVX512-BF16's dot product was measured (Sapphire Rapids) it does 45 G multiply-adds a
// second on a core and the float32 FMA 91.
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include "isa.h"

enum { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4, ENCODINGS };
enum { PANEL = 16, GROUP = 32, OUTPUT_MULTIPLE = 32, MOST_TOKENS = 12 };

// Tiles whose weights are decoded at once, for prompts, are as many as fit half of a 1 MiB L2 cache as floats.
enum { DECODED_BYTES = 512 * 1024 };

typedef struct {
    const uint8_t *data;
    const uint16_t *group_scales;  // INT4 alone
    const float *row_scales;       // INT8 alone
    long outputs, inputs;          // N without the padding, K
} Weight;

typedef struct {
    int max_tokens, outputs;
    void (*expand[ENCODINGS])(const Weight *, long, float *);
    void (*tile[ENCODINGS][MOST_TOKENS])(const Weight *, long, const float *, float *);
} Level;

#define INLINE static inline __attribute__((always_inline))

INLINE int bits_of(int encoding) {
    return encoding == FLOAT32 ? 32 : encoding == INT8 ? 8 : encoding == INT4 ? 4 : 16;
}

// Inputs whose weights a vector of lanes holds; FLOAT32, FLOAT16 and INT8 take two for company.
INLINE int unit_of(int encoding) { return encoding == INT4 ? 8 : 2; }

INLINE const uint8_t *weights_at(const Weight *weight, int encoding, long output) {
    const long panel = weight->inputs * PANEL * bits_of(encoding) / 8;
    const int lane = encoding == FLOAT16 ? 2 : encoding == INT8 ? 1 : 4;
    return weight->data + output / PANEL * panel + output % PANEL * lane;
}

INLINE const uint16_t *scales_at(const Weight *weight, long output) {
    return weight->group_scales + output / PANEL * (weight->inputs / GROUP * PANEL) + output % PANEL;
}

#define NAME(x) avx512_##x
#define TARGET AVX512
#define VF __m512
#define VL 16
#define MAX_TOKENS 12
INLINE AVX512 __m512 avx512_zero(void) { return _mm512_setzero_ps(); }
INLINE AVX512 __m512 avx512_spread(const float *p) { return _mm512_set1_ps(*p); }
INLINE AVX512 __m512 avx512_fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE AVX512 void avx512_store(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
INLINE AVX512 __m512 avx512_scale(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
INLINE AVX512 __m512 avx512_weight(int encoding, const uint8_t *w, int k, __m512 scale) {
    if (encoding == FLOAT32) return _mm512_loadu_ps(w + k * PANEL * 4);
    if (encoding == FLOAT16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(w + k * PANEL * 2)));
    if (encoding == INT8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(w + k * PANEL))));
    const __m512i lanes = _mm512_loadu_si512(w);
    if (encoding == BFLOAT16)
        return _mm512_castsi512_ps(k ? _mm512_and_si512(lanes, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(lanes, 16));
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4 * k), values), scale);
}
#include "linear_tile.h"

#define NAME(x) avx2_##x
#define TARGET AVX2
#define VF __m256
#define VL 8
#define MAX_TOKENS 6
INLINE AVX2 __m256 avx2_zero(void) { return _mm256_setzero_ps(); }
INLINE AVX2 __m256 avx2_spread(const float *p) { return _mm256_set1_ps(*p); }
INLINE AVX2 __m256 avx2_fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE AVX2 void avx2_store(float *p, __m256 v) { _mm256_storeu_ps(p, v); }
INLINE AVX2 __m256 avx2_scale(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE AVX2 __m256 avx2_weight(int encoding, const uint8_t *w, int k, __m256 scale) {
    if (encoding == FLOAT32) return _mm256_loadu_ps((const float *)(w + k * PANEL * 4));
    if (encoding == FLOAT16) return _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + k * PANEL * 2)));
    if (encoding == INT8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(w + k * PANEL))));
    const __m256i lanes = _mm256_loadu_si256((const void *)w);
    if (encoding == BFLOAT16)
        return _mm256_castsi256_ps(k ? _mm256_and_si256(lanes, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(lanes, 16));
    const __m256i nibble = _mm256_and_si256(_mm256_srli_epi32(lanes, 4 * k), _mm256_set1_epi32(15));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8))), scale);
}
#include "linear_tile.h"

typedef struct {
    const Level *level;
    const Weight *weight;
    const float *x, *residual;
    float *packed, *out;
    long tokens, blocks;
    int encoding;
} Call;

// Tokens are cut into blocks as equal as can be. Returns the first token of block b; that of b + 1 is its end.
static long block_start(const Call *call, long b) { return call->tokens * b / call->blocks; }

// Block b of x [T][K] as [K][tokens of the block], so that a tile reads it in one run.
static void pack_block(const Call *call, long b) {
    const long start = block_start(call, b), count = block_start(call, b + 1) - start, inputs = call->weight->inputs;
    float *to = call->packed + start * inputs;
    for (long k = 0; k < inputs; k++)
        for (long t = 0; t < count; t++) to[k * count + t] = call->x[(start + t) * inputs + k];
}

static void finish_tile(const Call *call, long b, long first, const float *sums) {
    const long start = block_start(call, b), end = block_start(call, b + 1), all = call->weight->outputs;
    const long count = all - first < call->level->outputs ? all - first : call->level->outputs;
    for (long t = start; t < end; t++, sums += call->level->outputs) {
        float *out = call->out + t * all + first;
        const float *residual = call->residual ? call->residual + t * all + first : 0;
        for (long n = 0; n < count; n++) {
            float y = sums[n];
            if (call->encoding == INT8) y *= call->weight->row_scales[first + n];
            out[n] = residual ? y + residual[n] : y;
        }
    }
}

// Outputs `first` up to `end`, all tokens. `decoded`: room for as many tiles as floats, or none: then tiles decode.
static void run_tiles(const Call *call, long first, long end, float *decoded) {
    float sums[MOST_TOKENS * OUTPUT_MULTIPLE] __attribute__((aligned(64)));
    const long step = call->level->outputs, inputs = call->weight->inputs;
    const int encoding = decoded ? FLOAT32 : call->encoding;
    if (decoded)
        for (long n = first; n < end; n += step)
            call->level->expand[call->encoding](call->weight, n, decoded + (n - first) * inputs);
    const Weight floats = {.data = (const uint8_t *)decoded, .inputs = inputs};
    const Weight *weight = decoded ? &floats : call->weight;
    for (long b = 0; b < call->blocks; b++) {
        const long start = block_start(call, b), count = block_start(call, b + 1) - start;
        for (long n = first; n < end; n += step) {
            call->level->tile[encoding][count - 1](weight, decoded ? n - first : n, call->packed + start * inputs, sums);
            finish_tile(call, b, n, sums);
        }
    }
}

// x [T, K], out [T, N] and residual [T, N] (or NULL) are float32 and contiguous. Returns 0, or 1 without memory.
int tk_linear(const uint8_t *data, const uint16_t *group_scales, const float *row_scales, const float *x,
              const float *residual, float *out, long tokens, long outputs, long inputs, int encoding, int isa,
              int threads) {
    const Level *level = isa >= ISA_AVX512 ? &avx512_level : &avx2_level;
    const Weight weight = {data, group_scales, row_scales, outputs, inputs};
    Call call = {.level = level, .weight = &weight, .x = x, .residual = residual, .packed = (float *)x, .out = out,
                 .tokens = tokens, .blocks = (tokens + level->max_tokens - 1) / level->max_tokens,
                 .encoding = encoding};
    // Worth it from three blocks on: decoding and storing a tile costs about what running it twice with decoding does.
    const int decode = encoding != FLOAT32 && call.blocks > 2;
    long group = decode ? DECODED_BYTES / (inputs * level->outputs * 4) : 1;
    if (group < 1) group = 1;
    group *= level->outputs;
    const long groups = (outputs + group - 1) / group;
    float *decoded = 0;
    if (decode && !(decoded = aligned_alloc(64, threads * group * inputs * 4))) return 1;
    if (tokens > 1 && !(call.packed = aligned_alloc(64, (tokens * inputs * 4 + 63) / 64 * 64))) {
        free(decoded);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        if (tokens > 1) {
#pragma omp for schedule(static)
            for (long b = 0; b < call.blocks; b++) pack_block(&call, b);
        }
        float *room = decoded ? decoded + omp_get_thread_num() * group * inputs : 0;
#pragma omp for schedule(static)
        for (long g = 0; g < groups; g++)
            run_tiles(&call, g * group, (g + 1) * group < outputs ? (g + 1) * group : outputs, room);
    }
    if (tokens > 1) free(call.packed);
    free(decoded);
    return 0;
}
