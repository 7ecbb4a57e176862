/* CPU kernels for decoding: a whole forward for one token of one request, and attention and activation of a batch.

Compiled at run time by build.py, once per element type of the matrices and the cache (see dtypes.h).
Letters as in modeling_tinystories.py: C hidden_size, H heads, K key-value heads, D head_dim, I intermediate_size,
V vocabulary; S is the capacity of the cache in positions. */

#include <math.h>
#include <stddef.h>
#include "dtypes.h"

enum { LANES = 16, BLOCK = 16 * LANES, MAX_HEAD_DIM = 256 };

/* Floats in a vector register: gcc keeps wider vectors in memory. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline vector load_vector(const elem_t *x) {
#ifdef BFLOAT16
    typedef uint16_t bf16_vector __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
    typedef uint32_t bits __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
    return (vector)(__builtin_convertvector(*(const bf16_vector *)x, bits) << 16);
#else
    return *(const vector *)x;
#endif
}

/* bindings.py declares the same fields in the same order. A bias or norm that a model lacks is NULL. */
typedef struct {
    const float *norm_1, *norm_1_bias; /* (C,) */
    const weight_t *qkv;               /* ((H + 2 K) D, C) */
    const float *qkv_bias;
    const float *q_norm, *k_norm; /* (D,) */
    const weight_t *out;          /* (C, H D) */
    const float *out_bias;
    const float *norm_2, *norm_2_bias;
    const weight_t *up; /* (I, C); llama (2 I, C), the gates first */
    const float *up_bias;
    const weight_t *down; /* (C, I) */
    const float *down_bias;
    elem_t *keys;   /* (slots, K, S / LANES, D, LANES): LANES scores at a time, without horizontal sums */
    elem_t *values; /* (slots, K, S, D) */
    const float *qkv_scale, *out_scale, *up_scale, *down_scale; /* one per row with INT8, else NULL */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, capacity, llama, threads;
    double eps;
    const elem_t *embedding, *positions; /* (V, C), gpt2: (S or more, C) */
    const float *cos, *sin;              /* llama: (S or more, D / 2) */
    const float *norm, *norm_bias;
    const weight_t *head;    /* (V, C) */
    const float *head_scale; /* (V,) with INT8, else NULL */
    const Layer *layers;
} Model;

#ifdef INT8
/* y[i] = scale[i] * W[i] . x + bias[i] for the rows [from, to) of W. x is rounded to 12 bits, fewer where the sum of n
   products could exceed 32. Integers of 8 and 16 bits are multiplied by one instruction on most processors. */
static void matvec(float *y, const int8_t *W, const float *scale, const float *bias, const float *x, int64_t n,
                   int64_t from, int64_t to) {
    int16_t levels[n];
    float largest = 0, limit = INT32_MAX / (127 * n) < 2047 ? INT32_MAX / (127 * n) : 2047;
    for (int64_t j = 0; j < n; j++) largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
    float per_unit = largest > 0 ? limit / largest : 0;
    for (int64_t j = 0; j < n; j++) levels[j] = (int32_t)rintf(x[j] * per_unit);
    for (int64_t i = from; i < to; i++) {
        const int8_t *w = W + i * n;
        int32_t sum = 0;
        for (int64_t j = 0; j < n; j++) sum += (int32_t)w[j] * (int32_t)levels[j];
        y[i] = scale[i] * (largest / limit) * sum + (bias ? bias[i] : 0);
    }
}
#else
/* y[i] = W[i] . x + bias[i] for the rows [from, to) of W. Four independent sums hide the latency of an addition. */
static void matvec(float *y, const elem_t *W, const float *scale, const float *bias, const float *x, int64_t n,
                   int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const elem_t *w = W + i * n;
        vector a = {0}, b = {0}, c = {0}, d = {0};
        int64_t j = 0;
        for (; j + 4 * WIDTH <= n; j += 4 * WIDTH) {
            a += load_vector(w + j) * *(const vector *)(x + j);
            b += load_vector(w + j + WIDTH) * *(const vector *)(x + j + WIDTH);
            c += load_vector(w + j + 2 * WIDTH) * *(const vector *)(x + j + 2 * WIDTH);
            d += load_vector(w + j + 3 * WIDTH) * *(const vector *)(x + j + 3 * WIDTH);
        }
        a = (a + b) + (c + d);
        float sum = bias ? bias[i] : 0;
        for (; j < n; j++) sum += to_float(w[j]) * x[j];
        for (int lane = 0; lane < WIDTH; lane++) sum += a[lane];
        y[i] = sum;
    }
}
#endif

static void rms_norm(float *y, const float *x, const float *weight, int64_t n, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void layer_norm(float *y, const float *x, const float *weight, const float *bias, int64_t n, float eps) {
    float mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(variance / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

static void norm(const Model *m, float *y, const float *x, const float *weight, const float *bias) {
    if (m->llama)
        rms_norm(y, x, weight, m->hidden, m->eps);
    else
        layer_norm(y, x, weight, bias, m->hidden, m->eps);
}

static void apply_rotary_pos_emb(float *x, const float *cos, const float *sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

static inline void prefetch(const elem_t *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(elem_t)) __builtin_prefetch(x + i);
}

/* Attention of one query over the keys and values 0..n-1, block by block (online softmax, arXiv 1805.02867).
   Prefetches the block's values, then `next_keys`: a step reads the keys and values of each request once, and
   they are too short for the hardware prefetcher. */
static inline __attribute__((always_inline)) void
attend_query(float *out, const float *q, const elem_t *keys, const elem_t *values, const elem_t *next_keys,
             int64_t n, int64_t D) {
    float scale = 1 / sqrtf(D), max_score = -1e30f, sum = 0, weights[BLOCK], weighted_sum[MAX_HEAD_DIM];
    for (int64_t d = 0; d < D; d++) weighted_sum[d] = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t size = n - start < BLOCK ? n - start : BLOCK;
        for (int64_t s = 0; s < size; s += LANES) { /* scores past n are computed but not used */
            const elem_t *key = keys + (start + s) * D;
            prefetch(values + (start + s) * D, LANES * D);
            for (int lane = 0; lane < LANES; lane += WIDTH, key += WIDTH) {
                vector even = {0}, odd = {0};
                for (int64_t d = 0; d + 1 < D; d += 2) {
                    even += q[d] * load_vector(key + d * LANES);
                    odd += q[d + 1] * load_vector(key + (d + 1) * LANES);
                }
                if (D % 2) even += q[D - 1] * load_vector(key + (D - 1) * LANES);
                *(vector *)(weights + s + lane) = (even + odd) * scale;
            }
        }
        float new_max_score = max_score;
        for (int64_t s = 0; s < size; s++) new_max_score = weights[s] > new_max_score ? weights[s] : new_max_score;
        float rescale = expf(max_score - new_max_score);
        sum *= rescale, max_score = new_max_score;
        for (int64_t s = 0; s < size; s++) weights[s] = expf(weights[s] - max_score);
        for (int64_t s = 0; s < size; s++) sum += weights[s];
        int64_t d = 0;
        for (; d + 2 * WIDTH <= D; d += 2 * WIDTH) {
            vector low = *(vector *)(weighted_sum + d) * rescale, high = *(vector *)(weighted_sum + d + WIDTH) * rescale;
            for (int64_t s = 0; s < size; s++) {
                const elem_t *value = values + (start + s) * D + d;
                if (d == 0) prefetch(next_keys + (start + s) * D, D);
                low += weights[s] * load_vector(value);
                high += weights[s] * load_vector(value + WIDTH);
            }
            *(vector *)(weighted_sum + d) = low, *(vector *)(weighted_sum + d + WIDTH) = high;
        }
        for (; d < D; d++) {
            weighted_sum[d] *= rescale;
            for (int64_t s = 0; s < size; s++) weighted_sum[d] += weights[s] * to_float(values[(start + s) * D + d]);
        }
    }
    for (int64_t d = 0; d < D; d++) out[d] = weighted_sum[d] / sum;
}

/* Key-value head `k` of one request: store its key and value in the cache, then compute its queries' attention.
   `qkv` ((H + 2 K) D,) belongs to the token at `position`; `out` (H D,). */
static void attend_head(const Model *m, const Layer *l, float *out, float *qkv, int64_t slot, int64_t position,
                        int64_t k) {
    int64_t D = m->head_dim, group = m->heads / m->kv_heads, offset = (slot * m->kv_heads + k) * m->capacity * D;
    float *key = qkv + (m->heads + k) * D, *value = key + m->kv_heads * D;
    elem_t *keys = l->keys + offset, *values = l->values + offset;
    if (l->k_norm) rms_norm(key, key, l->k_norm, D, m->eps);
    if (m->cos) apply_rotary_pos_emb(key, m->cos + position * (D / 2), m->sin + position * (D / 2), D);
    for (int64_t d = 0; d < D; d++) {
        keys[(position / LANES * D + d) * LANES + position % LANES] = from_float(key[d]);
        values[position * D + d] = from_float(value[d]);
    }
    for (int64_t h = k * group; h < (k + 1) * group; h++) {
        float *q = qkv + h * D;
        if (l->q_norm) rms_norm(q, q, l->q_norm, D, m->eps);
        if (m->cos) apply_rotary_pos_emb(q, m->cos + position * (D / 2), m->sin + position * (D / 2), D);
        if (D == 32) /* a constant size lets the compiler unroll */
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, 32);
        else if (D == 64)
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, 64);
        else
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, D);
    }
}

/* Attention of one layer for the next token of n requests, in the cache slots 0..n-1.
   qkv (n, (H + 2 K) D) is overwritten; positions (n,), out (n, H D). */
void attend(const Model *m, int64_t layer, int64_t n, float *qkv, const int64_t *positions, float *out) {
    int64_t qkv_size = (m->heads + 2 * m->kv_heads) * m->head_dim, out_size = m->heads * m->head_dim;
#pragma omp parallel for num_threads(m->threads) schedule(static)
    for (int64_t i = 0; i < n * m->kv_heads; i++) {
        int64_t row = i / m->kv_heads;
        attend_head(m, m->layers + layer, out + row * out_size, qkv + row * qkv_size, row, positions[row],
                    i % m->kv_heads);
    }
}

static float gelu_tanh(float x) { return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
static float silu(float x) { return x / (1 + expf(-x)); }

/* The activation of the feed-forward layer for n requests: inner (n, I), llama (n, 2 I), to out (n, I). */
void activate(const Model *m, int64_t n, const elem_t *inner, elem_t *out) {
    int64_t I = m->intermediate, inner_size = m->llama ? 2 * I : I;
#pragma omp parallel for num_threads(m->threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const elem_t *x = inner + row * inner_size;
        elem_t *y = out + row * I;
        if (m->llama)
            for (int64_t i = 0; i < I; i++) y[i] = from_float(silu(to_float(x[i])) * to_float(x[I + i]));
        else
            for (int64_t i = 0; i < I; i++) y[i] = from_float(gelu_tanh(to_float(x[i])));
    }
}

/* Start of the part of `n` items that thread `t` computes; it ends where the next thread's begins. */
static int64_t chunk_start(int64_t n, int64_t t, int64_t threads) { return n * t / threads; }

/* Logits (V,) of the token after `token`, which is at `position` of the request in slot 0.
   scratch: 2 C + (2 H + 2 K) D + 2 I floats, and C more for each thread. */
void next_logits(const Model *m, int64_t token, int64_t position, float *scratch, float *logits) {
    int64_t C = m->hidden, D = m->head_dim, I = m->intermediate, K = m->kv_heads, qkv_size = (m->heads + 2 * K) * D;
    float *x = scratch, *projected = x + C, *qkv = projected + C, *attended = qkv + qkv_size;
    float *inner = attended + m->heads * D, *thread_scratch = inner + 2 * I;
    for (int64_t i = 0; i < C; i++)
        x[i] = to_float(m->embedding[token * C + i]) + (m->positions ? to_float(m->positions[position * C + i]) : 0);
#pragma omp parallel num_threads(m->threads)
    {
        int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
        float *normed = thread_scratch + t * C; /* every thread computes the norm: cheaper than a barrier */
        int64_t c0 = chunk_start(C, t, threads), c1 = chunk_start(C, t + 1, threads);
        int64_t i0 = chunk_start(I, t, threads), i1 = chunk_start(I, t + 1, threads);
        int64_t k0 = chunk_start(K, t, threads), k1 = chunk_start(K, t + 1, threads), whole_heads = K % threads == 0;
        for (const Layer *l = m->layers; l < m->layers + m->num_layers; l++) {
            norm(m, normed, x, l->norm_1, l->norm_1_bias);
            if (whole_heads) { /* each thread projects the heads it attends with: no barrier needed */
                int64_t keys = m->heads, values = keys + K, group = m->heads / K;
                matvec(qkv, l->qkv, l->qkv_scale, l->qkv_bias, normed, C, k0 * group * D, k1 * group * D);
                matvec(qkv, l->qkv, l->qkv_scale, l->qkv_bias, normed, C, (keys + k0) * D, (keys + k1) * D);
                matvec(qkv, l->qkv, l->qkv_scale, l->qkv_bias, normed, C, (values + k0) * D, (values + k1) * D);
            } else {
                matvec(qkv, l->qkv, l->qkv_scale, l->qkv_bias, normed, C, chunk_start(qkv_size, t, threads),
                       chunk_start(qkv_size, t + 1, threads));
#pragma omp barrier
            }
            for (int64_t k = k0; k < k1; k++) attend_head(m, l, attended, qkv, 0, position, k);
#pragma omp barrier
            matvec(projected, l->out, l->out_scale, l->out_bias, attended, m->heads * D, c0, c1);
            for (int64_t i = c0; i < c1; i++) x[i] += projected[i];
#pragma omp barrier
            norm(m, normed, x, l->norm_2, l->norm_2_bias);
            matvec(inner, l->up, l->up_scale, l->up_bias, normed, C, i0, i1);
            if (m->llama) {
                matvec(inner, l->up, l->up_scale, l->up_bias, normed, C, I + i0, I + i1);
                for (int64_t i = i0; i < i1; i++) inner[i] = silu(inner[i]) * inner[I + i];
            } else {
                for (int64_t i = i0; i < i1; i++) inner[i] = gelu_tanh(inner[i]);
            }
#pragma omp barrier
            matvec(projected, l->down, l->down_scale, l->down_bias, inner, I, c0, c1);
            for (int64_t i = c0; i < c1; i++) x[i] += projected[i];
#pragma omp barrier
        }
        norm(m, normed, x, m->norm, m->norm_bias);
        matvec(logits, m->head, m->head_scale, NULL, normed, C, chunk_start(m->vocab, t, threads),
               chunk_start(m->vocab, t + 1, threads));
    }
}
