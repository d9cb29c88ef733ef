// Attention over keys and values in blocks: storing a step's own, and decoding over a sequence's. attention.py has the
// contract; its torch twins are the reference.
//
// One head of one sequence is always computed in the same order, by one thread: its result depends neither on the
// sequences beside it nor on the number of threads.
#include "values.h"

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

INLINE long bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

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

// Values from which on a second thread pays; two cores of Sapphire Rapids break even at 9,000, as in rows.c.
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
    const char *keys, *values;
    const int32_t *tables, *lengths;
    float *out;
    long kv_heads, group, size, max_blocks, block_size;  // group: query heads of a kv head
    float scale;
} Attention;

// Positions whose keys are read in one go, and then their values: what is read now was fetched while the other half was
// computed with. A unit's tile of both fills 128 KiB of the second-level cache.
enum { TILE = 64 };

// Queries of a chunk that a unit of work has: their scores, values and a tile's keys take 64 KiB at 64 values a head.
enum { QUERIES = 64 };

typedef struct {
    Attention attention;  // of one sequence
    long queries;         // its last positions
} Chunk;

// Where the tile's positions from `start` on lie in the cache, in bytes; returns how many there are. The last one fills
// the places that are left.
INLINE long find(const Attention *a, long b, long start, long head_bytes, long *at) {
    const long left = a->lengths[b] - start, tile = left < TILE ? (left > 0 ? left : 0) : TILE;
    for (long j = 0; j < tile; j++) {
        const long block = a->tables[b * a->max_blocks + (start + j) / a->block_size];
        at[j] = (block * a->block_size + (start + j) % a->block_size) * a->kv_heads * head_bytes;
    }
    for (long j = tile; tile && j < TILE; j++) at[j] = at[tile - 1];
    return tile;
}

INLINE void fetch(const char *from, long bytes) {
    for (long i = 0; i < bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
}

typedef float avx512_Floats __attribute__((vector_size(64)));
typedef float avx2_Floats __attribute__((vector_size(32)));

#define NAME(x) avx512_##x
#define TARGET AVX512
#define VL 16
TARGET INLINE __m512 NAME(sums)(const avx512_Floats *x) {
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++) {
        const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
        eight[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
        four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        four[i] = _mm512_add_ps(four[i], _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}
TARGET INLINE __m512 NAME(whole)(const char *from, int dtype) {
    if (dtype == FLOAT32) return _mm512_loadu_ps(from);
    const __m256i half = _mm256_loadu_si256((const __m256i *)from);
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
#include "attention_level.h"

#define NAME(x) avx2_##x
#define TARGET AVX2
#define VL 8
TARGET INLINE __m256 NAME(sums)(const avx2_Floats *x) {
    __m256 two[2];
    for (int i = 0; i < 2; i++)
        two[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]),
                                _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]));
    return _mm256_add_ps(_mm256_permute2f128_ps(two[0], two[1], 0x20), _mm256_permute2f128_ps(two[0], two[1], 0x31));
}
TARGET INLINE __m256 NAME(whole)(const char *from, int dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)from);
    const __m128i half = _mm_loadu_si128((const __m128i *)from);
    if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
#include "attention_level.h"

// Bytes of one position's keys that a unit of work has, in whole heads: a run long enough for the memory, and units
// enough for the threads.
#define UNIT_BYTES 1024
// Bytes of keys and values from which on a second thread pays: it breaks even below 32 KiB when the threads are awake.
#define PARALLEL_BYTES (64 * 1024)

typedef void Attend(const Attention *, long, long, long);
typedef void AttendChunk(const Chunk *, long, long);

static int in_range(const Attention *a, long b, long blocks) {
    if (a->lengths[b] < 1 || a->lengths[b] > a->max_blocks * a->block_size) return 0;
    for (long i = 0; i <= (a->lengths[b] - 1) / a->block_size; i++)
        if (a->tables[b * a->max_blocks + i] < 0 || a->tables[b * a->max_blocks + i] >= blocks) return 0;
    return 1;
}

// Returns -1, or the first sequence whose length or block is out of range; then nothing is written.
long tk_decode_attention(const float *q, const void *keys, const void *values, const int32_t *tables,
                         const int32_t *lengths, float *out, long batch, long heads, long kv_heads, long size,
                         long blocks, long max_blocks, long block_size, float scale, int dtype, int level, int threads) {
    const Attention a = {q,        keys,           values, tables,     lengths,    out,
                         kv_heads, heads / kv_heads, size,   max_blocks, block_size, scale};
    long positions = 0;
    for (long b = 0; b < batch; b++) {
        if (!in_range(&a, b, blocks)) return b;
        positions += lengths[b];
    }
    static Attend *const functions[2][3] = {
        {avx2_attend_FLOAT32, avx2_attend_FLOAT16, avx2_attend_BFLOAT16},
        {avx512_attend_FLOAT32, avx512_attend_FLOAT16, avx512_attend_BFLOAT16},
    };
    Attend *const attend = functions[level == ISA_AVX512][dtype];
    const long head_bytes = size * bytes_of(dtype), bytes = positions * kv_heads * head_bytes * 2;
    const long unit = head_bytes < UNIT_BYTES ? UNIT_BYTES / head_bytes : 1, units = (kv_heads + unit - 1) / unit;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && bytes > PARALLEL_BYTES)
    for (long i = 0; i < batch * units; i++) {
        const long first = i % units * unit, last = first + unit < kv_heads ? first + unit : kv_heads;
        attend(&a, i / units, first, last);
    }
    return -1;
}

// The last `queries` positions of a sequence. Returns -1, or 0 if its length or a block is out of range.
long tk_chunk_attention(const float *q, const void *keys, const void *values, const int32_t *table, int32_t length,
                        float *out, long queries, long heads, long kv_heads, long size, long blocks, long max_blocks,
                        long block_size, float scale, int dtype, int level, int threads) {
    const Attention a = {q,        keys,           values, table,     &length,    out,
                         kv_heads, heads / kv_heads, size,   max_blocks, block_size, scale};
    if (!in_range(&a, 0, blocks) || queries > length) return 0;
    const Chunk chunk = {a, queries};
    static AttendChunk *const functions[2][3] = {
        {avx2_chunk_FLOAT32, avx2_chunk_FLOAT16, avx2_chunk_BFLOAT16},
        {avx512_chunk_FLOAT32, avx512_chunk_FLOAT16, avx512_chunk_BFLOAT16},
    };
    AttendChunk *const attend = functions[level == ISA_AVX512][dtype];
    const long tiles = (queries + QUERIES - 1) / QUERIES;
    // A head's queries one after the other, while the caches hold its keys and values; its last ones, which see most,
    // first: what remains at the end is short.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long i = 0; i < heads * tiles; i++) attend(&chunk, i / tiles, (tiles - 1 - i % tiles) * QUERIES);
    return -1;
}
