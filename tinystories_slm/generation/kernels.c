/* What decoding spends its time on, for a processor: one token of one story, and the attention of many.

Compiled at run time by kernels.py, once per type of the stored numbers (matrices and cache; see numbers.h).
Letters as in modeling_tinystories.py: C hidden_size, H heads, K key-value heads, D head_dim, I intermediate_size,
V vocabulary, S positions that the cache holds. */

#include <math.h>
#include <stddef.h>
#include <omp.h>
#include "numbers.h"

enum { LANES = 16, BLOCK = 16 * LANES, MAX_HEAD_DIM = 256 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline lanes widen_lanes(const stored *x) {
#ifdef BFLOAT16
    typedef uint16_t narrow_lanes __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    return (lanes)(__builtin_convertvector(*(const narrow_lanes *)x, bits) << 16);
#else
    return *(const lanes *)x;
#endif
}

/* The order of the fields is that of kernels.py. A bias or norm that a model lacks is NULL. */
typedef struct {
    const float *norm_1, *norm_1_bias; /* (C,) */
    const stored *qkv;                 /* ((H + 2 K) D, C) */
    const float *qkv_bias;
    const float *q_norm, *k_norm; /* (D,) */
    const stored *out;            /* (C, H D) */
    const float *out_bias;
    const float *norm_2, *norm_2_bias;
    const stored *up; /* (I, C); modern (2 I, C), the gates first */
    const float *up_bias;
    const stored *down; /* (C, I) */
    const float *down_bias;
    stored *keys;   /* (places, K, S / LANES, D, LANES): LANES scores at once need no sum across */
    stored *values; /* (places, K, S, D) */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, capacity, modern, threads;
    double eps;
    const stored *embedding, *positions; /* (V, C), gpt: (S or more, C) */
    const float *cos, *sin;              /* modern: (S or more, D / 2) */
    const float *norm, *norm_bias;
    const stored *head; /* (V, C) */
    const Layer *layers;
} Model;

/* y[i] = W[i] . x + bias[i] for the rows [from, to) of W; four sums at a time hide each other's latency. */
static void matvec(float *y, const stored *W, const float *bias, const float *x, int64_t n, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const stored *w = W + i * n;
        lanes a = {0}, b = {0}, c = {0}, d = {0};
        int64_t j = 0;
        for (; j + 4 * LANES <= n; j += 4 * LANES) {
            a += widen_lanes(w + j) * *(const lanes *)(x + j);
            b += widen_lanes(w + j + LANES) * *(const lanes *)(x + j + LANES);
            c += widen_lanes(w + j + 2 * LANES) * *(const lanes *)(x + j + 2 * LANES);
            d += widen_lanes(w + j + 3 * LANES) * *(const lanes *)(x + j + 3 * LANES);
        }
        a = (a + b) + (c + d);
        float sum = bias ? bias[i] : 0;
        for (; j < n; j++) sum += widen(w[j]) * x[j];
        for (int lane = 0; lane < LANES; lane++) sum += a[lane];
        y[i] = sum;
    }
}

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
    if (m->modern)
        rms_norm(y, x, weight, m->hidden, m->eps);
    else
        layer_norm(y, x, weight, bias, m->hidden, m->eps);
}

static void rotate(float *x, const float *cos, const float *sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

static inline void fetch(const stored *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(stored)) __builtin_prefetch(x + i);
}

/* One query over the keys and values 0..n-1, a block at a time (softmax as in arXiv 1805.02867). While it
   computes it asks for what comes next, first these values, then `next_keys`: each story's are read once a
   step and too short for the processor to see by itself that they go on. */
static inline __attribute__((always_inline)) void
attend_query(float *out, const float *q, const stored *keys, const stored *values, const stored *next_keys,
             int64_t n, int64_t D) {
    float scale = 1 / sqrtf(D), top = -1e30f, sum = 0, weights[BLOCK], mixed[MAX_HEAD_DIM];
    for (int64_t d = 0; d < D; d++) mixed[d] = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t size = n - start < BLOCK ? n - start : BLOCK;
        for (int64_t s = 0; s < size; s += LANES) { /* what lies behind n is computed, and not looked at */
            const stored *key = keys + (start + s) * D;
            lanes even = {0}, odd = {0};
            fetch(values + (start + s) * D, LANES * D);
            for (int64_t d = 0; d + 1 < D; d += 2) {
                even += q[d] * widen_lanes(key + d * LANES);
                odd += q[d + 1] * widen_lanes(key + (d + 1) * LANES);
            }
            if (D % 2) even += q[D - 1] * widen_lanes(key + (D - 1) * LANES);
            *(lanes *)(weights + s) = (even + odd) * scale;
        }
        float new_top = top;
        for (int64_t s = 0; s < size; s++) new_top = weights[s] > new_top ? weights[s] : new_top;
        float old = expf(top - new_top);
        sum *= old, top = new_top;
        for (int64_t s = 0; s < size; s++) weights[s] = expf(weights[s] - top);
        for (int64_t s = 0; s < size; s++) sum += weights[s];
        int64_t d = 0;
        for (; d + 2 * LANES <= D; d += 2 * LANES) {
            lanes low = *(lanes *)(mixed + d) * old, high = *(lanes *)(mixed + d + LANES) * old;
            for (int64_t s = 0; s < size; s++) {
                const stored *value = values + (start + s) * D + d;
                if (d == 0) fetch(next_keys + (start + s) * D, D);
                low += weights[s] * widen_lanes(value);
                high += weights[s] * widen_lanes(value + LANES);
            }
            *(lanes *)(mixed + d) = low, *(lanes *)(mixed + d + LANES) = high;
        }
        for (; d < D; d++) {
            mixed[d] *= old;
            for (int64_t s = 0; s < size; s++) mixed[d] += weights[s] * widen(values[(start + s) * D + d]);
        }
    }
    for (int64_t d = 0; d < D; d++) out[d] = mixed[d] / sum;
}

/* Key-value head `k` of one story: its key and value enter the cache, its queries attend.
   `qkv` ((H + 2 K) D,) is that of the token at `position`; `out` (H D,). */
static void attend_head(const Model *m, const Layer *l, float *out, float *qkv, int64_t place, int64_t position, int64_t k) {
    int64_t D = m->head_dim, group = m->heads / m->kv_heads, at = (place * m->kv_heads + k) * m->capacity * D;
    float *key = qkv + (m->heads + k) * D, *value = key + m->kv_heads * D;
    stored *keys = l->keys + at, *values = l->values + at;
    if (l->k_norm) rms_norm(key, key, l->k_norm, D, m->eps);
    if (m->cos) rotate(key, m->cos + position * (D / 2), m->sin + position * (D / 2), D);
    for (int64_t d = 0; d < D; d++) {
        keys[(position / LANES * D + d) * LANES + position % LANES] = narrow(key[d]);
        values[position * D + d] = narrow(value[d]);
    }
    for (int64_t h = k * group; h < (k + 1) * group; h++) {
        float *q = qkv + h * D;
        if (l->q_norm) rms_norm(q, q, l->q_norm, D, m->eps);
        if (m->cos) rotate(q, m->cos + position * (D / 2), m->sin + position * (D / 2), D);
        if (D == 32) /* known sizes unroll */
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, 32);
        else if (D == 64)
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, 64);
        else
            attend_query(out + h * D, q, keys, values, keys + m->capacity * D, position + 1, D);
    }
}

/* Attention of one layer for the next token of n stories, in the places 0..n-1 of the cache.
   qkv (n, (H + 2 K) D) is used up, positions (n,), out (n, H D). */
void attend(const Model *m, int64_t layer, int64_t n, float *qkv, const int64_t *positions, float *out) {
    int64_t wide = (m->heads + 2 * m->kv_heads) * m->head_dim, narrow_ = m->heads * m->head_dim;
#pragma omp parallel for num_threads(m->threads) schedule(static)
    for (int64_t i = 0; i < n * m->kv_heads; i++) {
        int64_t row = i / m->kv_heads;
        attend_head(m, m->layers + layer, out + row * narrow_, qkv + row * wide, row, positions[row], i % m->kv_heads);
    }
}

static float gelu_tanh(float x) { return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
static float silu(float x) { return x / (1 + expf(-x)); }

/* The activation of the feed-forward layer for n stories: inner (n, I), modern (n, 2 I), to out (n, I). */
void activate(const Model *m, int64_t n, const stored *inner, stored *out) {
    int64_t I = m->intermediate, wide = m->modern ? 2 * I : I;
#pragma omp parallel for num_threads(m->threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        const stored *x = inner + row * wide;
        stored *y = out + row * I;
        if (m->modern)
            for (int64_t i = 0; i < I; i++) y[i] = narrow(silu(widen(x[i])) * widen(x[I + i]));
        else
            for (int64_t i = 0; i < I; i++) y[i] = narrow(gelu_tanh(widen(x[i])));
    }
}

/* The share of thread `t` of `n` things. */
static int64_t share(int64_t n, int64_t t, int64_t threads) { return n * t / threads; }

/* Logits (V,) of what follows `token` at `position` of the story in place 0.
   scratch: 2 C + (2 H + 2 K) D + 2 I floats, and C more for each thread. */
void next_logits(const Model *m, int64_t token, int64_t position, float *scratch, float *logits) {
    int64_t C = m->hidden, D = m->head_dim, I = m->intermediate, K = m->kv_heads, wide = (m->heads + 2 * K) * D;
    float *x = scratch, *projected = x + C, *qkv = projected + C, *mixed = qkv + wide;
    float *inner = mixed + m->heads * D, *own = inner + 2 * I;
    for (int64_t i = 0; i < C; i++)
        x[i] = widen(m->embedding[token * C + i]) + (m->positions ? widen(m->positions[position * C + i]) : 0);
#pragma omp parallel num_threads(m->threads)
    {
        int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
        float *normed = own + t * C; /* each thread norms for itself: cheaper than waiting for one */
        int64_t c0 = share(C, t, threads), c1 = share(C, t + 1, threads);
        int64_t i0 = share(I, t, threads), i1 = share(I, t + 1, threads);
        int64_t k0 = share(K, t, threads), k1 = share(K, t + 1, threads), whole_heads = K % threads == 0;
        for (const Layer *l = m->layers; l < m->layers + m->num_layers; l++) {
            norm(m, normed, x, l->norm_1, l->norm_1_bias);
            if (whole_heads) { /* projected by the thread that attends with them: nobody has to wait */
                int64_t keys = m->heads, values = keys + K, group = m->heads / K;
                matvec(qkv, l->qkv, l->qkv_bias, normed, C, k0 * group * D, k1 * group * D);
                matvec(qkv, l->qkv, l->qkv_bias, normed, C, (keys + k0) * D, (keys + k1) * D);
                matvec(qkv, l->qkv, l->qkv_bias, normed, C, (values + k0) * D, (values + k1) * D);
            } else {
                matvec(qkv, l->qkv, l->qkv_bias, normed, C, share(wide, t, threads), share(wide, t + 1, threads));
#pragma omp barrier
            }
            for (int64_t k = k0; k < k1; k++) attend_head(m, l, mixed, qkv, 0, position, k);
#pragma omp barrier
            matvec(projected, l->out, l->out_bias, mixed, m->heads * D, c0, c1);
            for (int64_t i = c0; i < c1; i++) x[i] += projected[i];
#pragma omp barrier
            norm(m, normed, x, l->norm_2, l->norm_2_bias);
            matvec(inner, l->up, l->up_bias, normed, C, i0, i1);
            if (m->modern) {
                matvec(inner, l->up, l->up_bias, normed, C, I + i0, I + i1);
                for (int64_t i = i0; i < i1; i++) inner[i] = silu(inner[i]) * inner[I + i];
            } else {
                for (int64_t i = i0; i < i1; i++) inner[i] = gelu_tanh(inner[i]);
            }
#pragma omp barrier
            matvec(projected, l->down, l->down_bias, inner, I, c0, c1);
            for (int64_t i = c0; i < c1; i++) x[i] += projected[i];
#pragma omp barrier
        }
        norm(m, normed, x, m->norm, m->norm_bias);
        matvec(logits, m->head, NULL, normed, C, share(m->vocab, t, threads), share(m->vocab, t + 1, threads));
    }
}
