// Attention over keys and values in blocks: storing a step's own, and decoding over a sequence's. attention.py has the
// contract; its torch twins are the reference.
//
// One head of one sequence is always computed in the same order, by one thread: its result depends neither on the
// sequences beside it nor on the number of threads.
#include "values.h"

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

INLINE long bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Without the processor's own instruction, which loops of several levels cannot name. Giesen's way: the exponent is
// moved, and what has the smallest or largest exponent is mended.
INLINE float from_f16(uint16_t bits) {
    const uint32_t moved = ((uint32_t)bits & 0x7fff) << 13, exponent = moved & 0x0f800000;
    const float tiny = float_of(moved + (113u << 23)) - 0x1p-14f;
    const uint32_t large = moved + (exponent == 0x0f800000 ? 224u << 23 : 112u << 23);
    const uint32_t found = exponent ? large : bits_of_float(tiny);
    return float_of(found | ((uint32_t)bits & 0x8000) << 16);
}

INLINE float value_at(const void *values, long i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)values)[i];
    return dtype == BFLOAT16 ? from_bf16(((const Bits16 *)values)[i]) : from_f16(((const Bits16 *)values)[i]);
}

INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    return (uint16_t)((value != value ? bits | 1u << 22 : rounded) >> 16);
}

AVX2 static void store(const float *from, void *to, long at, long size, int dtype) {
    if (dtype == FLOAT32) memcpy((float *)to + at, from, size * sizeof *from);
    for (long i = 0; i < size && dtype == BFLOAT16; i++) ((uint16_t *)to)[at + i] = to_bf16(from[i]);
    for (long i = 0; i < size && dtype == FLOAT16; i++)
        ((uint16_t *)to)[at + i] = (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from[i]), 0));
}

AVX2 static void rotate(const float *x, const float *cos, const float *sin, long size, float *out) {
    const long half = size / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] - x[half + i] * sin[i];
        out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
    }
}

// Waking the threads costs as much as rotating or storing this many values.
#define PARALLEL_VALUES (16 * 1024)

// Returns -1, or the first token whose place is out of range; then nothing is written.
long tk_store_kv(const float *qkv, const float *cos, const float *sin, const int64_t *places, void *keys, void *values,
                 float *q, long tokens, long heads, long kv_heads, long size, long room, int dtype, int threads) {
    for (long t = 0; t < tokens; t++)
        if (places[t] < 0 || places[t] >= room) return t;
    const long width = (heads + 2 * kv_heads) * size;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 1 && tokens * width > PARALLEL_VALUES)
    for (long t = 0; t < tokens; t++) {
        const float *x = qkv + t * width, *c = cos + t * size, *s = sin + t * size;
        for (long h = 0; h < heads; h++, x += size) rotate(x, c, s, size, q + (t * heads + h) * size);
        for (long h = 0; h < kv_heads; h++, x += size) {
            float turned[size];
            rotate(x, c, s, size, turned);
            store(turned, keys, (places[t] * kv_heads + h) * size, size, dtype);
        }
        store(x, values, places[t] * kv_heads * size, kv_heads * size, dtype);
    }
    return -1;
}

typedef struct {
    const float *q;
    const void *keys, *values;
    const int32_t *tables, *lengths;
    float *out;
    long heads, kv_heads, size, max_blocks, block_size;
    float scale;
} Attention;

// Positions between two corrections of the softmax by the largest score so far. A tile's keys and scores of a few heads
// fit the second-level cache.
#define TILE 64

// e^x for x <= 0, or NaN: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], within 2 units in the last place.
INLINE float exp_of(float x) {
    x = x < -87 ? -87 : x;
    const float n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;  // rounded to a whole number
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * float_of((uint32_t)((int32_t)n + 127) << 23);
}

INLINE const void *at(const void *cache, long value, int dtype) { return (const char *)cache + value * bytes_of(dtype); }

// Heads [first, last) of sequence b; `size` is known to the compiler where it is worth it.
INLINE void attend(const Attention *a, long b, long first, long last, int dtype, long size) {
    const long group = a->heads / a->kv_heads, length = a->lengths[b], heads = last - first;
    float q[heads][size], sums[heads][size], scores[heads][TILE], largest[heads], total[heads];
    for (long h = 0; h < heads; h++) {
        largest[h] = -__builtin_inff();
        total[h] = 0;
        for (long i = 0; i < size; i++) {
            q[h][i] = a->q[((b * a->heads) + first + h) * size + i] * a->scale;
            sums[h][i] = 0;
        }
    }
    for (long start = 0; start < length; start += TILE) {
        const long tile = length - start < TILE ? length - start : TILE;
        long rows[TILE];  // the first value of each position
        for (long j = 0; j < tile; j++) {
            const long block = a->tables[b * a->max_blocks + (start + j) / a->block_size];
            rows[j] = (block * a->block_size + (start + j) % a->block_size) * a->kv_heads * size;
        }
        for (long j = 0; j < tile; j++)
            for (long h = 0; h < heads; h++) {
                const void *key = at(a->keys, rows[j] + (first + h) / group * size, dtype);
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (long i = 0; i < size; i++) dot += q[h][i] * value_at(key, i, dtype);
                scores[h][j] = dot;
            }
        for (long h = 0; h < heads; h++) {
            float most = largest[h], sum = 0;
            for (long j = 0; j < tile; j++) most = scores[h][j] > most ? scores[h][j] : most;
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < tile; j++) sum += scores[h][j] = exp_of(scores[h][j] - most);
            const float shrink = exp_of(largest[h] - most);
            total[h] = total[h] * shrink + sum;
            largest[h] = most;
#pragma omp simd
            for (long i = 0; i < size; i++) sums[h][i] *= shrink;
        }
        for (long j = 0; j < tile; j++)
            for (long h = 0; h < heads; h++) {
                const void *value = at(a->values, rows[j] + (first + h) / group * size, dtype);
                const float share = scores[h][j];
#pragma omp simd
                for (long i = 0; i < size; i++) sums[h][i] += share * value_at(value, i, dtype);
            }
    }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < size; i++) a->out[(b * a->heads + first + h) * size + i] = sums[h][i] / total[h];
}

typedef void Attend(const Attention *, long, long, long);

#define ONE(TARGET, name, dtype) \
    TARGET static void name(const Attention *a, long b, long first, long last) { \
        if (a->size == 64) \
            attend(a, b, first, last, dtype, 64); \
        else if (a->size == 128) \
            attend(a, b, first, last, dtype, 128); \
        else \
            attend(a, b, first, last, dtype, a->size); \
    }
ONE(AVX2, avx2_float32, FLOAT32)
ONE(AVX2, avx2_float16, FLOAT16)
ONE(AVX2, avx2_bfloat16, BFLOAT16)
ONE(AVX512, avx512_float32, FLOAT32)
ONE(AVX512, avx512_float16, FLOAT16)
ONE(AVX512, avx512_bfloat16, BFLOAT16)

// Heads that a thread takes at a time: enough for long runs of bytes, few enough to share a sequence among threads.
#define UNIT 8
// Waking the threads costs as much as reading this many bytes of keys and values.
#define PARALLEL_BYTES (64 * 1024)

// Returns -1, or the first sequence whose length or block is out of range; then nothing is written.
long tk_decode_attention(const float *q, const void *keys, const void *values, const int32_t *tables,
                         const int32_t *lengths, float *out, long batch, long heads, long kv_heads, long size,
                         long blocks, long max_blocks, long block_size, float scale, int dtype, int level, int threads) {
    const Attention a = {q,     keys,     values, tables,     lengths,    out,
                         heads, kv_heads, size,   max_blocks, block_size, scale};
    long positions = 0;
    for (long b = 0; b < batch; b++) {
        if (lengths[b] < 1 || lengths[b] > max_blocks * block_size) return b;
        for (long i = 0; i <= (lengths[b] - 1) / block_size; i++)
            if (tables[b * max_blocks + i] < 0 || tables[b * max_blocks + i] >= blocks) return b;
        positions += lengths[b];
    }
    static Attend *const functions[2][3] = {{avx2_float32, avx2_float16, avx2_bfloat16},
                                            {avx512_float32, avx512_float16, avx512_bfloat16}};
    Attend *const function = functions[level == ISA_AVX512][dtype];
    const long units = (heads + UNIT - 1) / UNIT, bytes = positions * kv_heads * size * 2 * bytes_of(dtype);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && bytes > PARALLEL_BYTES)
    for (long unit = 0; unit < batch * units; unit++) {
        const long first = unit % units * UNIT;
        function(&a, unit / units, first, first + UNIT < heads ? first + UNIT : heads);
    }
    return -1;
}
