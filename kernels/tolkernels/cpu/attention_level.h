// The inner loops of attention.c, written once and included for each level of instructions, with
//   NAME(x)      the name of x at this level
//   TARGET       the attribute that allows its instructions
//   VL           floats of a vector: 16 or 8
// and the operations NAME(sums), the sums of VL vectors as one, and NAME(whole), the vector of values at an address. It
// undefines these at the end.

#define FORCE TARGET INLINE
typedef int32_t NAME(Ints) __attribute__((vector_size(VL * 4)));
#define VF NAME(Floats)
#define VI NAME(Ints)

// Values [i, i + VL) of a head's `size`, zeros behind its end.
FORCE VF NAME(values)(const char *head, long i, long size, int dtype) {
    const char *from = head + i * bytes_of(dtype);
    if (size - i >= VL) return (VF)NAME(whole)(from, dtype);
    float part[VL] = {0};
    memcpy(part, from, (size - i) * bytes_of(dtype));
    return (VF)NAME(whole)((const char *)part, dtype);
}

// e^x for x <= 0, or NaN: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], within 2 units in the last place.
FORCE VF NAME(exp)(VF x) {
    const VI low = x < -87.0f;  // all bits, or none
    x = (VF)((~low & (VI)x) | (low & (VI)((VF){0} - 87.0f)));
    const VF n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;  // rounded to a whole number
    const VF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    VF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (VF)((__builtin_convertvector(n, VI) + 127) << 23);
}

// A query head's softmax as far as it is known.
typedef struct {
    VF scores[TILE / VL];
    float largest, total;
} NAME(Softmax);

// q times the keys of a tile's positions. Meanwhile `fetched` bytes of each one's values are fetched.
FORCE void NAME(score)(const VF *q, const char *keys, const long *at, long tile, int dtype, long size, VF *scores,
                       const char *values, long fetched) {
    const long vectors = (size + VL - 1) / VL;
    for (long j = 0; j < tile; j += VL) {
        VF dots[VL];
#pragma GCC unroll 16
        for (long i = 0; i < VL; i++) {
            dots[i] = q[0] * NAME(values)(keys + at[j + i], 0, size, dtype);
            for (long n = 1; n < vectors; n++) dots[i] += q[n] * NAME(values)(keys + at[j + i], n * VL, size, dtype);
            fetch(values + at[j + i], fetched);
        }
        scores[j / VL] = NAME(sums)(dots);
    }
}

// Turns a tile's scores into shares; returns by how much what was summed before shrinks.
FORCE float NAME(shares)(NAME(Softmax) *head, long tile) {
    float *scores = (float *)head->scores, most = head->largest;
    for (long j = 0; j < tile; j++) most = scores[j] > most ? scores[j] : most;
    for (long j = tile; j < TILE; j++) scores[j] = -__builtin_inff();
    VF sums[VL] = {{0}};
    for (long j = 0; j < TILE / VL; j++) sums[0] += head->scores[j] = NAME(exp)(head->scores[j] - most);
    const float shrink = NAME(exp)((VF){0} + (head->largest - most))[0];
    head->total = head->total * shrink + ((VF)NAME(sums)(sums))[0];
    head->largest = most;
    return shrink;
}

// Adds the tile's values times their shares to the sums so far. Meanwhile the next tile's keys are fetched.
FORCE void NAME(gather)(const float *shares, const char *values, const long *at, long tile, int dtype, long size,
                        float shrink, VF *sums, const char *keys, const long *next, long fetched) {
    const long vectors = (size + VL - 1) / VL;
    VF found[vectors];
    for (long n = 0; n < vectors; n++) found[n] = sums[n] * shrink;
    for (long j = 0; j < tile; j++) {
        for (long n = 0; n < vectors; n++) found[n] += NAME(values)(values + at[j], n * VL, size, dtype) * shares[j];
        fetch(keys + next[j], fetched);
    }
    for (long n = 0; n < vectors; n++) sums[n] = found[n];
}

// The query heads of kv heads [first, last) of sequence b. `size` is a constant where that is worth it.
FORCE void NAME(attend)(const Attention *a, long b, long first, long last, int dtype, long size) {
    const long vectors = (size + VL - 1) / VL, group = a->group, heads = (last - first) * group;
    const long head_bytes = size * bytes_of(dtype);
    const char *keys = a->keys + first * head_bytes, *values = a->values + first * head_bytes;
    const float *from = a->q + (b * a->kv_heads + first) * group * size;
    VF q[heads][vectors], sums[heads][vectors];
    NAME(Softmax) softmax[heads];
    for (long h = 0; h < heads; h++) {
        softmax[h].largest = -__builtin_inff();
        softmax[h].total = 0;
        for (long i = 0; i < vectors; i++) {
            q[h][i] = NAME(values)((const char *)(from + h * size), i * VL, size, FLOAT32) * a->scale;
            sums[h][i] = (VF){0};
        }
    }
    long at[2][TILE], tile = find(a, b, 0, head_bytes, at[0]);
    for (long j = 0; j < tile; j++) fetch(keys + at[0][j], (last - first) * head_bytes);
    for (long start = 0, turn = 0; tile; start += TILE, turn ^= 1) {
        for (long h = 0; h < heads; h++) {
            const long offset = h / group * head_bytes, fetched = h % group ? 0 : head_bytes;
            NAME(score)(q[h], keys + offset, at[turn], tile, dtype, size, softmax[h].scores, values + offset, fetched);
        }
        const long next = find(a, b, start + TILE, head_bytes, at[!turn]);
        for (long h = 0; h < heads; h++) {
            const long offset = h / group * head_bytes, fetched = h % group || !next ? 0 : head_bytes;
            const float shrink = NAME(shares)(&softmax[h], tile);
            NAME(gather)((float *)softmax[h].scores, values + offset, at[turn], tile, dtype, size, shrink, sums[h],
                         keys + offset, at[!turn], fetched);
        }
        tile = next;
    }
    float *to = a->out + (b * a->kv_heads + first) * group * size;
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < size; i++) to[h * size + i] = ((float *)sums[h])[i] / softmax[h].total;
}

// c [rows][width] += a b, where a's number at (r, k) lies at a[r * a_row + k * a_step] and b is [depth][width]. `rows` is a
// multiple of ROWS, and `width` is even. Each sum is one chain in the order of k.
enum { NAME(ROWS) = VL / 2 };
FORCE void NAME(product)(const float *a, long a_row, long a_step, const VF *b, VF *c, long width, long rows, long depth) {
    for (long r = 0; r < rows; r += NAME(ROWS))
        for (long x = 0; x < width; x += 2) {
            VF sums[NAME(ROWS)][2];
#pragma GCC unroll 8
            for (long i = 0; i < NAME(ROWS); i++)
#pragma GCC unroll 2
                for (long n = 0; n < 2; n++) sums[i][n] = c[(r + i) * width + x + n];
            for (long k = 0; k < depth; k++)
#pragma GCC unroll 8
                for (long i = 0; i < NAME(ROWS); i++)
#pragma GCC unroll 2
                    for (long n = 0; n < 2; n++)
                        sums[i][n] += a[(r + i) * a_row + k * a_step] * b[k * width + x + n];
#pragma GCC unroll 8
            for (long i = 0; i < NAME(ROWS); i++)
#pragma GCC unroll 2
                for (long n = 0; n < 2; n++) c[(r + i) * width + x + n] = sums[i][n];
        }
}

// A tile's positions of one head as floats [TILE][padded], zeros behind a head's end and behind the last position.
FORCE void NAME(widen)(const char *values, const long *at, long tile, int dtype, long size, long padded, float *to) {
    for (long j = 0; j < TILE; j++)
        for (long i = 0; i < padded; i += VL) {
            VF *found = (VF *)(to + j * padded + i);
            *found = j < tile && i < size ? NAME(values)(values + at[j], i, size, dtype) : (VF){0};
        }
}

// Makes shares of scores [TILE][width] of positions from `start` on, whose first query is at position `first`, and
// shrinks the sums [padded][width] so far.
FORCE void NAME(causal_shares)(VF *scores, long start, long first, VF *largest, VF *total, VF *sums, long width,
                               long padded) {
    for (long x = 0; x < width; x++) {
        VI seen;  // how many positions of the tile each query may see
        for (long i = 0; i < VL; i++) seen[i] = (int32_t)(first + x * VL + i - start + 1);
        VF most = largest[x];
        for (int32_t j = 0; j < TILE; j++) {
            const VF score = scores[j * width + x];
            const VI better = (seen > j) & (score > most);
            most = (VF)((better & (VI)score) | (~better & (VI)most));
        }
        VF sum = {0};
        for (int32_t j = 0; j < TILE; j++) {
            const VF share = NAME(exp)(scores[j * width + x] - most);
            sum += scores[j * width + x] = (VF)((seen > j) & (VI)share);
        }
        const VF shrink = NAME(exp)(largest[x] - most);
        total[x] = total[x] * shrink + sum;
        largest[x] = most;
        for (long i = 0; i < padded; i++) sums[i * width + x] *= shrink;
    }
}

// Queries [first, first + QUERIES) of a chunk, or as many as there are, of one head. All is computed with a query in a
// lane: nothing of it depends on the queries beside it.
FORCE void NAME(attend_chunk)(const Chunk *c, long head, long first, int dtype, long size) {
    const Attention *a = &c->attention;
    const long queries = c->queries - first < QUERIES ? c->queries - first : QUERIES;
    const long width = (queries + 2 * VL - 1) / (2 * VL) * 2, padded = (size + VL - 1) / VL * VL;
    const long stride = a->kv_heads * a->group * size, at_first = (first * a->kv_heads * a->group + head) * size;
    const long head_bytes = size * bytes_of(dtype), offset = head / a->group * head_bytes;
    VF q[size][width], sums[padded][width], scores[TILE][width], largest[width], total[width];
    VF wide[TILE * padded / VL];
    memset(q, 0, sizeof q);
    memset(sums, 0, sizeof sums);
    for (long t = 0; t < queries; t++)
        for (long i = 0; i < size; i++) ((float *)q[i])[t] = a->q[at_first + t * stride + i];
    for (long x = 0; x < width; x++) {
        for (long i = 0; i < size; i++) q[i][x] *= a->scale;
        largest[x] = (VF){0} - __builtin_inff();
        total[x] = (VF){0};
    }
    const long begin = a->lengths[0] - c->queries + first, end = begin + queries;  // positions of the queries
    long at[2][TILE], turn = 0;
    find(a, 0, 0, head_bytes, at[0]);
    for (long start = 0; start < end; start += TILE, turn ^= 1) {
        const long tile = end - start < TILE ? end - start : TILE, next = find(a, 0, start + TILE, head_bytes, at[!turn]);
        NAME(widen)(a->keys + offset, at[turn], tile, dtype, size, padded, (float *)wide);
        for (long j = 0; j < tile; j++) fetch(a->values + offset + at[turn][j], head_bytes);
        for (long j = 0; j < next; j++) fetch(a->keys + offset + at[!turn][j], head_bytes);
        memset(scores, 0, sizeof scores);
        NAME(product)((float *)wide, padded, 1, q[0], scores[0], width, TILE, size);
        NAME(causal_shares)(scores[0], start, begin, largest, total, sums[0], width, padded);
        NAME(widen)(a->values + offset, at[turn], tile, dtype, size, padded, (float *)wide);
        NAME(product)((float *)wide, 1, padded, scores[0], sums[0], width, padded, tile);
    }
    for (long i = 0; i < size; i++)
        for (long x = 0; x < width; x++) sums[i][x] /= total[x];
    for (long t = 0; t < queries; t++)
        for (long i = 0; i < size; i++) a->out[at_first + t * stride + i] = ((float *)sums[i])[t];
}

// Head sizes that most models have are constants.
#define SIZED(function, dtype, ...) \
    if (a->size == 64) \
        NAME(function)(__VA_ARGS__, dtype, 64); \
    else if (a->size == 128) \
        NAME(function)(__VA_ARGS__, dtype, 128); \
    else \
        NAME(function)(__VA_ARGS__, dtype, a->size);
#define ONE(dtype) \
    static TARGET void NAME(attend_##dtype)(const Attention *a, long b, long first, long last) { \
        SIZED(attend, dtype, a, b, first, last) \
    } \
    static TARGET void NAME(chunk_##dtype)(const Chunk *c, long head, long first) { \
        const Attention *a = &c->attention; \
        SIZED(attend_chunk, dtype, c, head, first) \
    }
ONE(FLOAT32)
ONE(FLOAT16)
ONE(BFLOAT16)

#undef ONE
#undef SIZED
#undef FORCE
#undef VF
#undef VI
#undef NAME
#undef TARGET
#undef VL
