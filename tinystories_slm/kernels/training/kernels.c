/* CPU kernels for the operations between the matrix products of a training step. Each kernel reads and writes
its rows once; PyTorch's separate operations make a pass over memory each.

Compiled at run time by build.py. Letters as in modeling_tinystories.py: B batch, T tokens, C hidden_size,
H heads, K key-value heads, D head_dim, I intermediate_size, V vocabulary; n rows. Every loop over rows has a
static schedule and every thread has its own sums over rows, so results are deterministic for a given number
of threads. */

#include <math.h>
#include "dtypes.h"

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads(threads) schedule(static)")
/* The iterations are independent: none reads what another writes. */
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(x) SIMD_REDUCTION(omp simd reduction(+ : x))
#define SIMD_SUMS(x, y) SIMD_REDUCTION(omp simd reduction(+ : x, y))
#define SIMD_MAX(x) SIMD_REDUCTION(omp simd reduction(max : x))
#define SIMD_REDUCTION(x) _Pragma(#x)

/* floorf and x - whole * ln 2, for |x| < 100, as vector instructions. Without those of SSE4.1 and FMA the functions
   of math.h are calls of a library. A double is exact enough in any order of operations. */
static inline float floor_(float x) {
#if defined(__x86_64__) && !defined(__SSE4_1__)
    float whole = (float)(int32_t)x;
    return whole - (whole > x ? 1.0f : 0.0f);
#else
    return floorf(x);
#endif
}

static inline float minus_ln2_times(float x, float whole) {
#if defined(__x86_64__) && !defined(__FMA__)
    return (float)((double)x - (double)whole * 0.69314718055994531);
#else
    return __builtin_fmaf(whole, 2.12194440e-4f, __builtin_fmaf(whole, -0.693359375f, x));
#endif
}

/* e^x to 1e-7 (Cephes' polynomial), in operations that a compiler vectorizes; NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = floor_(x * 1.44269504f + 0.5f);
    float rest = minus_ln2_times(x, whole);
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    int32_t exponent = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &exponent, 4);
    return p * power;
}

enum { LANES = 16 }; /* floats in the widest vector register */

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

/* ---- norms: y = (x - mean) * scale * weight; RMSNorm subtracts no mean ------------------------------------ */

/* x, y (n, C); stats (n, 2): mean and scale. */
void norm_forward(int64_t threads, int64_t centered, int64_t n, int64_t C, float eps, const elem_t *x,
                  const float *weight, elem_t *y, float *stats) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        const elem_t *from = x + row * C;
        elem_t *to = y + row * C;
        float mean = 0, squares = 0;
        if (centered) {
            SIMD_SUM(mean)
            for (int64_t i = 0; i < C; i++) mean += to_float(from[i]);
            mean /= C;
        }
        SIMD_SUM(squares)
        for (int64_t i = 0; i < C; i++) squares += (to_float(from[i]) - mean) * (to_float(from[i]) - mean);
        float scale = 1 / sqrtf(squares / C + eps);
        SIMD
        for (int64_t i = 0; i < C; i++) to[i] = from_float((to_float(from[i]) - mean) * scale * weight[i]);
        stats[2 * row] = mean, stats[2 * row + 1] = scale;
    }
}

/* Backward of one row: add its gradients to dx and weight_grad. */
static inline void norm_row_backward(int64_t centered, int64_t C, float mean, float scale, const elem_t *x,
                                     const float *weight, const elem_t *dy, elem_t *dx, float *weight_grad) {
    float sum = 0, dot = 0;
    SIMD_SUMS(sum, dot)
    for (int64_t i = 0; i < C; i++) {
        float hat = (to_float(x[i]) - mean) * scale, g = to_float(dy[i]);
        weight_grad[i] += g * hat;
        sum += g * weight[i];
        dot += g * weight[i] * hat;
    }
    sum = centered ? sum / C : 0, dot /= C;
    SIMD
    for (int64_t i = 0; i < C; i++) {
        float hat = (to_float(x[i]) - mean) * scale;
        dx[i] = from_float(to_float(dx[i]) + scale * (to_float(dy[i]) * weight[i] - sum - hat * dot));
    }
}

/* Add to dx (n, C), which holds the gradient of the residual stream. weight_grads (threads, C) start at 0. */
void norm_backward(int64_t threads, int64_t centered, int64_t n, int64_t C, const elem_t *x, const float *stats,
                   const float *weight, const elem_t *dy, elem_t *dx, float *weight_grads) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++)
        norm_row_backward(centered, C, stats[2 * row], stats[2 * row + 1], x + row * C, weight, dy + row * C,
                          dx + row * C, weight_grads + omp_get_thread_num() * C);
}

/* ---- queries, keys and values ----------------------------------------------------------------------------- */

typedef struct {
    int64_t B, T, H, K, D;
    float eps;
    const float *q_norm, *k_norm; /* (D,), or NULL */
    const float *cos, *sin;       /* (T, D), or (B T, D) if angle_rows is T, each value twice; or NULL */
    int64_t angle_rows;           /* 0: the sequences share their angles */
    const int64_t *first_keys;    /* (B, T): the first key of each query, as its story starts there; or NULL */
} Heads;

/* One head of one token: RMSNorm if `weight` is given, rotary embedding by row `angle` if `cos` is given, then times
   `factor`. */
static inline void head_forward(const Heads *m, const elem_t *x, const float *weight, int64_t angle, float factor,
                                elem_t *y, float *scale) {
    int64_t D = m->D, half = D / 2;
    float multiplier = 1;
    if (weight) {
        float squares = 0;
        SIMD_SUM(squares)
        for (int64_t i = 0; i < D; i++) squares += to_float(x[i]) * to_float(x[i]);
        multiplier = 1 / sqrtf(squares / D + m->eps);
    }
    *scale = multiplier;
    if (!m->cos) {
        SIMD
        for (int64_t i = 0; i < D; i++)
            y[i] = from_float(to_float(x[i]) * multiplier * (weight ? weight[i] : 1) * factor);
        return;
    }
    const float *cos = m->cos + angle * D, *sin = m->sin + angle * D;
    multiplier *= factor;
    SIMD
    for (int64_t i = 0; i < half; i++) {
        float a = to_float(x[i]) * multiplier * (weight ? weight[i] : 1);
        float b = to_float(x[i + half]) * multiplier * (weight ? weight[i + half] : 1);
        y[i] = from_float(a * cos[i] - b * sin[i]);
        y[i + half] = from_float(b * cos[i] + a * sin[i]);
    }
}

/* Backward: dy, summed over the query heads that share this head, to dx; adds to weight_grad. */
static inline void head_backward(const Heads *m, const elem_t *x, const float *weight, int64_t angle, float factor,
                                 float scale, const float *dy, elem_t *dx, float *weight_grad) {
    int64_t D = m->D, half = D / 2;
    float g[D];
    if (m->cos) {
        const float *cos = m->cos + angle * D, *sin = m->sin + angle * D;
        SIMD
        for (int64_t i = 0; i < half; i++) {
            g[i] = (dy[i] * cos[i] + dy[i + half] * sin[i]) * factor;
            g[i + half] = (dy[i + half] * cos[i] - dy[i] * sin[i]) * factor;
        }
    } else {
        SIMD
        for (int64_t i = 0; i < D; i++) g[i] = dy[i] * factor;
    }
    if (!weight) {
        SIMD
        for (int64_t i = 0; i < D; i++) dx[i] = from_float(g[i]);
        return;
    }
    float dot = 0;
    SIMD_SUM(dot)
    for (int64_t i = 0; i < D; i++) {
        float hat = to_float(x[i]) * scale;
        weight_grad[i] += g[i] * hat;
        dot += g[i] * weight[i] * hat;
    }
    dot /= D;
    SIMD
    for (int64_t i = 0; i < D; i++) dx[i] = from_float(scale * (g[i] * weight[i] - to_float(x[i]) * scale * dot));
}

/* qkv (B T, (H + 2 K) D) to q, k, v (B, H, T, D). Keys and values are repeated for each query head; queries are
   divided by sqrt(D). scales (B T, H + K): those of the norms. */
void heads_forward(int64_t threads, const Heads *m, const elem_t *qkv, elem_t *q, elem_t *k, elem_t *v, float *scales) {
    int64_t H = m->H, K = m->K, D = m->D, T = m->T, group = H / K;
    float factor = 1 / sqrtf(D);
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * T; row++) {
        int64_t b = row / T, t = row % T, angle = b * m->angle_rows + t;
        const elem_t *x = qkv + row * (H + 2 * K) * D;
        float *scale = scales + row * (H + K);
        for (int64_t h = 0; h < H; h++)
            head_forward(m, x + h * D, m->q_norm, angle, factor, q + ((b * H + h) * T + t) * D, scale + h);
        for (int64_t j = 0; j < K; j++) {
            elem_t *key = k + ((b * H + j * group) * T + t) * D, *value = v + ((b * H + j * group) * T + t) * D;
            head_forward(m, x + (H + j) * D, m->k_norm, angle, 1, key, scale + H + j);
            memcpy(value, x + (H + K + j) * D, D * sizeof(elem_t));
            for (int64_t copy = 1; copy < group; copy++) {
                memcpy(key + copy * T * D, key, D * sizeof(elem_t));
                memcpy(value + copy * T * D, value, D * sizeof(elem_t));
            }
        }
    }
}

/* dq, dk, dv (B, H, T, D) to dqkv (B T, (H + 2 K) D); norm_grads (threads, 2, D) start at 0. */
void heads_backward(int64_t threads, const Heads *m, const elem_t *qkv, const float *scales, const elem_t *dq,
                    const elem_t *dk, const elem_t *dv, elem_t *dqkv, float *norm_grads) {
    int64_t H = m->H, K = m->K, D = m->D, T = m->T, group = H / K;
    float factor = 1 / sqrtf(D);
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * T; row++) {
        int64_t b = row / T, t = row % T, angle = b * m->angle_rows + t;
        const elem_t *x = qkv + row * (H + 2 * K) * D;
        elem_t *dx = dqkv + row * (H + 2 * K) * D;
        const float *scale = scales + row * (H + K);
        float *q_grad = norm_grads + omp_get_thread_num() * 2 * D, *k_grad = q_grad + D, key[D], value[D];
        for (int64_t h = 0; h < H; h++) {
            const elem_t *from = dq + ((b * H + h) * T + t) * D;
            SIMD
            for (int64_t i = 0; i < D; i++) key[i] = to_float(from[i]);
            head_backward(m, x + h * D, m->q_norm, angle, factor, scale[h], key, dx + h * D, q_grad);
        }
        for (int64_t j = 0; j < K; j++) {
            SIMD
            for (int64_t i = 0; i < D; i++) key[i] = value[i] = 0;
            for (int64_t h = j * group; h < (j + 1) * group; h++) {
                int64_t at = ((b * H + h) * T + t) * D;
                SIMD
                for (int64_t i = 0; i < D; i++) key[i] += to_float(dk[at + i]), value[i] += to_float(dv[at + i]);
            }
            head_backward(m, x + (H + j) * D, m->k_norm, angle, 1, scale[H + j], key, dx + (H + j) * D, k_grad);
            SIMD
            for (int64_t i = 0; i < D; i++) dx[(H + K + j) * D + i] = from_float(value[i]);
        }
    }
}

/* Copy heads (B, H, size, D), for the queries [start, start + size), into tokens (B, T, H, D). */
void heads_to_tokens(int64_t threads, const Heads *m, int64_t start, int64_t size, const elem_t *heads,
                     elem_t *tokens) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * size; row++) {
        int64_t b = row / size, t = row % size;
        for (int64_t h = 0; h < m->H; h++)
            memcpy(tokens + ((b * m->T + start + t) * m->H + h) * m->D, heads + ((b * m->H + h) * size + t) * m->D,
                   m->D * sizeof(elem_t));
    }
}

/* Copy tokens (B, T, H, D) into heads (B, H, T, D). */
void tokens_to_heads(int64_t threads, const Heads *m, const elem_t *tokens, elem_t *heads) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * m->T; row++) {
        int64_t b = row / m->T, t = row % m->T;
        for (int64_t h = 0; h < m->H; h++)
            memcpy(heads + ((b * m->H + h) * m->T + t) * m->D, tokens + (row * m->H + h) * m->D, m->D * sizeof(elem_t));
    }
}

/* ---- causal softmax --------------------------------------------------------------------------------------- */

/* First key of the query at row `row` of scores (B H, size, keys) whose first query is `start`. */
static inline int64_t first_key(const Heads *m, int64_t start, int64_t size, int64_t row) {
    if (!m->first_keys) return 0;
    return m->first_keys[row / size / m->H * m->T + start + row % size];
}

/* Scores (B H, size, keys) of the queries [start, start + size) to attention weights, in place. A query attends to
   the keys from the first of its story to its own position; the weights of other keys are 0. */
void softmax_forward(int64_t threads, const Heads *m, int64_t start, int64_t size, int64_t keys, elem_t *scores) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * m->H * size; row++) {
        int64_t first = first_key(m, start, size, row), seen = start + row % size + 1 - first;
        elem_t *x = scores + row * keys + first;
        int64_t padded = (seen + LANES - 1) / LANES * LANES; /* padded vectors: no scalar remainder loop */
        float max_score = to_float(x[0]), sum = 0, e[padded];
        SIMD
        for (int64_t i = 0; i < seen; i++) e[i] = to_float(x[i]);
        for (int64_t i = seen; i < padded; i++) e[i] = -INFINITY;
        SIMD_MAX(max_score)
        for (int64_t i = 0; i < padded; i++) max_score = e[i] > max_score ? e[i] : max_score;
        SIMD_SUM(sum)
        for (int64_t i = 0; i < padded; i++) sum += e[i] = exp_(e[i] - max_score);
        float factor = 1 / sum;
        SIMD
        for (int64_t i = 0; i < seen; i++) x[i] = from_float(e[i] * factor);
        memset(x - first, 0, first * sizeof(elem_t));
        memset(x + seen, 0, (keys - first - seen) * sizeof(elem_t));
    }
}

/* `grads`: from the gradient of the attention weights to that of the scores, in place. */
void softmax_backward(int64_t threads, const Heads *m, int64_t start, int64_t size, int64_t keys,
                      const elem_t *weights, elem_t *grads) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * m->H * size; row++) {
        int64_t first = first_key(m, start, size, row), seen = start + row % size + 1 - first;
        const elem_t *w = weights + row * keys + first;
        elem_t *g = grads + row * keys + first;
        float dot = 0;
        SIMD_SUM(dot)
        for (int64_t i = 0; i < seen; i++) dot += to_float(w[i]) * to_float(g[i]);
        SIMD
        for (int64_t i = 0; i < seen; i++) g[i] = from_float(to_float(w[i]) * (to_float(g[i]) - dot));
        memset(g - first, 0, first * sizeof(elem_t));
        memset(g + seen, 0, (keys - first - seen) * sizeof(elem_t));
    }
}

/* ---- the activation of the feed-forward layer ------------------------------------------------------------- */

enum { GELU_TANH, SILU_GATED, RELU2_GATED };

/* gelu(x) = x s with s = (1 + tanh(u)) / 2 = sigmoid(2 u) */
static inline float gelu_gate(float x) { return sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }

/* inner (n, I), or gated (n, 2 I) with the gates first, to out (n, I). */
void activation_forward(int64_t threads, int64_t kind, int64_t n, int64_t I, const elem_t *inner, elem_t *out) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        const elem_t *x = inner + row * (kind == GELU_TANH ? I : 2 * I), *up = x + I;
        elem_t *y = out + row * I;
        if (kind == GELU_TANH)
            SIMD
            for (int64_t i = 0; i < I; i++) y[i] = from_float(to_float(x[i]) * gelu_gate(to_float(x[i])));
        else if (kind == SILU_GATED)
            SIMD
            for (int64_t i = 0; i < I; i++)
                y[i] = from_float(to_float(x[i]) * sigmoid(to_float(x[i])) * to_float(up[i]));
        else
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float positive = to_float(x[i]) > 0 ? to_float(x[i]) : 0;
                y[i] = from_float(positive * positive * to_float(up[i]));
            }
    }
}

/* dout (n, I) to dinner. Recomputes `out`: that costs less time than keeping it is worth in memory. */
void activation_backward(int64_t threads, int64_t kind, int64_t n, int64_t I, const elem_t *inner, const elem_t *dout,
                         elem_t *out, elem_t *dinner) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        int64_t wide = kind == GELU_TANH ? I : 2 * I;
        const elem_t *x = inner + row * wide, *up = x + I, *dy = dout + row * I;
        elem_t *y = out + row * I, *dx = dinner + row * wide, *dup = dx + I;
        if (kind == GELU_TANH)
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = to_float(x[i]), s = gelu_gate(v);
                float slope = 1.5957691216057308f * (1 + 0.134145f * v * v); /* derivative of the sigmoid's argument */
                y[i] = from_float(v * s);
                dx[i] = from_float(to_float(dy[i]) * s * (1 + v * (1 - s) * slope));
            }
        else if (kind == SILU_GATED)
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = to_float(x[i]), u = to_float(up[i]), g = to_float(dy[i]), s = sigmoid(v);
                y[i] = from_float(v * s * u);
                dup[i] = from_float(g * v * s);
                dx[i] = from_float(g * u * s * (1 + v * (1 - s)));
            }
        else
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = to_float(x[i]) > 0 ? to_float(x[i]) : 0, u = to_float(up[i]), g = to_float(dy[i]);
                y[i] = from_float(v * v * u);
                dup[i] = from_float(g * v * v);
                dx[i] = from_float(g * u * 2 * v);
            }
    }
}

/* ---- cross entropy ---------------------------------------------------------------------------------------- */

/* Logits (n, V) to their gradient, in place; losses (n,) in nats. For a negative label both are 0.
   scratch (threads, V). */
void cross_entropy(int64_t threads, int64_t n, int64_t V, elem_t *logits, const int64_t *labels, float *losses,
                   float *scratch) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        elem_t *x = logits + row * V;
        int64_t label = labels[row];
        if (label < 0) {
            memset(x, 0, V * sizeof(elem_t));
            losses[row] = 0;
            continue;
        }
        float max_logit = to_float(x[0]), sum = 0, label_logit = to_float(x[label]);
        float *e = scratch + omp_get_thread_num() * V;
        SIMD_MAX(max_logit)
        for (int64_t i = 0; i < V; i++) max_logit = to_float(x[i]) > max_logit ? to_float(x[i]) : max_logit;
        SIMD_SUM(sum)
        for (int64_t i = 0; i < V; i++) sum += e[i] = exp_(to_float(x[i]) - max_logit);
        losses[row] = logf(sum) - (label_logit - max_logit);
        float factor = 1 / sum;
        SIMD
        for (int64_t i = 0; i < V; i++) x[i] = from_float(e[i] * factor);
        x[label] = from_float(e[label] * factor - 1);
    }
}
