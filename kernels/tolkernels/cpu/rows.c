// A layer's rows added to the stream with the RMSNorm that follows, and that norm alone. gather.py has the contract;
// its torch twins are the reference. A token's result depends on that token alone.
#include "values.h"

// Values from which on a second thread pays. On two cores of Sapphire Rapids it does from 12,288 on, when the threads are
// still awake from the call before; a little more, since they may not be.
#define PARALLEL_VALUES (16 * 1024)

enum { BF16 = 0, INT8 = 1, INT4 = 2 };

typedef struct {
    const uint8_t *data, *host;  // the row of slot 0, and of record 0
    long stride, host_stride;    // bytes from one to the next
    const int64_t *slots;
    const float *scale;  // of each token's row, or NULL
    const float *stream, *weight;
    float *total, *normed;
    long width, group;
    float eps;
} Rows;

INLINE void norm(const float *x, const float *weight, float eps, long width, float *out) {
    // By hand: a reduction of OpenMP's passes its sum through memory at each step.
    typedef float Lanes __attribute__((vector_size(32), aligned(4)));
    Lanes sums[2] = {{0}, {0}};
    const long whole = width / 16 * 16;
    for (long i = 0; i < whole; i += 16)
        for (int n = 0; n < 2; n++) sums[n] += *(const Lanes *)(x + i + 8 * n) * *(const Lanes *)(x + i + 8 * n);
    float squares = 0;
    for (int i = 0; i < 8; i++) squares += sums[0][i] + sums[1][i];
    for (long i = whole; i < width; i++) squares += x[i] * x[i];
    const float root = 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(squares / (float)width + eps)));
#pragma omp simd
    for (long i = 0; i < width; i++) out[i] = x[i] * root * weight[i];
}

INLINE void add(const uint8_t *row, int encoding, long group, long width, const float *stream, float *total) {
    if (encoding == BF16) {
        const Bits16 *values = (const Bits16 *)row;
#pragma omp simd
        for (long i = 0; i < width; i++) total[i] = stream[i] + from_bf16(values[i]);
        return;
    }
    const Bits16 *scales = (const Bits16 *)(row + (encoding == INT8 ? width : width / 2));
    for (long start = 0; start < width; start += group) {
        const float scale = from_bf16(scales[start / group]);
        const float *from = stream + start;
        float *to = total + start;
        if (encoding == INT8) {
            const int8_t *values = (const int8_t *)row + start;
#pragma omp simd
            for (long i = 0; i < group; i++) to[i] = from[i] + (float)values[i] * scale;
        } else if (group % 2) {  // a byte may hold values of two groups
            for (long i = 0; i < group; i++) {
                const int bits = row[(start + i) / 2] >> (start + i) % 2 * 4 & 15;
                to[i] = from[i] + (float)((bits ^ 8) - 8) * scale;
            }
        } else {
            const uint8_t *pairs = row + start / 2;
#pragma omp simd
            for (long i = 0; i < group / 2; i++) {
                to[2 * i] = from[2 * i] + (float)(((pairs[i] & 15) ^ 8) - 8) * scale;
                to[2 * i + 1] = from[2 * i + 1] + (float)((pairs[i] >> 4 ^ 8) - 8) * scale;
            }
        }
    }
}

// Two loops, so that the compiler cannot make one instruction of product and sum: it would round once, and torch rounds
// twice. -0 is the number to which every row adds up as it is.
INLINE void add_scaled(const uint8_t *row, int encoding, long group, long width, float scale, const float *stream,
                       float *total) {
    for (long i = 0; i < width; i++) total[i] = -0.0f;
    add(row, encoding, group, width, total, total);
#pragma omp simd
    for (long i = 0; i < width; i++) total[i] *= scale;
#pragma omp simd
    for (long i = 0; i < width; i++) total[i] += stream[i];
}

INLINE void token(const Rows *rows, int encoding, long t) {
    const int64_t slot = rows->slots[t];
    const uint8_t *row = slot >= 0 ? rows->data + slot * rows->stride : rows->host + (-1 - slot) * rows->host_stride;
    const float *stream = rows->stream + t * rows->width;
    float *total = rows->total + t * rows->width;
    if (rows->scale)
        add_scaled(row, encoding, rows->group, rows->width, rows->scale[t], stream, total);
    else
        add(row, encoding, rows->group, rows->width, stream, total);
    norm(total, rows->weight, rows->eps, rows->width, rows->normed + t * rows->width);
}

#define LEVEL(TARGET, name) \
    TARGET static void name##_bf16(const Rows *rows, long t) { token(rows, BF16, t); } \
    TARGET static void name##_int8(const Rows *rows, long t) { token(rows, INT8, t); } \
    TARGET static void name##_int4(const Rows *rows, long t) { token(rows, INT4, t); } \
    TARGET static void name##_norm(const Rows *rows, long t) { \
        const long at = t * rows->width; \
        norm(rows->stream + at, rows->weight, rows->eps, rows->width, rows->normed + at); \
    }
LEVEL(AVX2, avx2)
LEVEL(AVX512, avx512)

typedef void Each(const Rows *, long);

static void each(Each *function, const Rows *rows, long tokens, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 1 && tokens * rows->width > PARALLEL_VALUES)
    for (long t = 0; t < tokens; t++) function(rows, t);
}

// Returns -1, or the place in `slots` of the first that is out of range; then nothing is written.
long tk_add_rows(const uint8_t *data, long slots_held, long stride, const uint8_t *host, long records, long host_stride,
                 const int64_t *slots, const float *scale, const float *stream, const float *weight, float *total,
                 float *normed, long tokens, long width, long group, float eps, int encoding, int level, int threads) {
    for (long t = 0; t < tokens; t++)
        if (slots[t] >= slots_held || slots[t] < -records) return t;
    static Each *const functions[2][3] = {{avx2_bf16, avx2_int8, avx2_int4}, {avx512_bf16, avx512_int8, avx512_int4}};
    const Rows rows = {data,   host,  stride, host_stride, slots, scale, stream,
                       weight, total, normed, width,       group, eps};
    each(functions[level == ISA_AVX512][encoding], &rows, tokens, threads);
    return -1;
}

void tk_rms_norm(const float *x, const float *weight, float *out, long tokens, long width, float eps, int level,
                 int threads) {
    const Rows rows = {.stream = x, .weight = weight, .normed = out, .width = width, .eps = eps};
    each(level == ISA_AVX512 ? avx512_norm : avx2_norm, &rows, tokens, threads);
}
