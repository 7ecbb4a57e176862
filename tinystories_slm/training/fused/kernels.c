/* What lies between the matrix products of a training step, for a processor: each kernel reads its rows once
and writes them once, where PyTorch's operations would go over them many times.

Compiled at run time by kernels.py. Letters as in modeling_tinystories.py: B batch, T tokens, C hidden_size,
H heads, K key-value heads, D head_dim, I intermediate_size, V vocabulary; n rows. Every loop over rows is
shared out statically, and sums over rows are kept a thread each: the result is the same each time, for the
same number of threads. */

#include <math.h>
#include <omp.h>
#include "numbers.h"

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads(threads) schedule(static)")
/* Iterations that may run side by side: nothing that one writes another reads. */
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(x) SIMD_REDUCTION(omp simd reduction(+ : x))
#define SIMD_SUMS(x, y) SIMD_REDUCTION(omp simd reduction(+ : x, y))
#define SIMD_MAX(x) SIMD_REDUCTION(omp simd reduction(max : x))
#define SIMD_REDUCTION(x) _Pragma(#x)

/* e^x to 1e-7, in operations that a compiler vectorizes (Cephes' polynomial); NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = floorf(x * 1.44269504f + 0.5f);
    float rest = __builtin_fmaf(whole, 2.12194440e-4f, __builtin_fmaf(whole, -0.693359375f, x));
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

enum { LANES = 16 }; /* of the widest vectors */

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

/* ---- norms: y = (x - mean) * scale * weight, without the mean for RMSNorm --------------------------------- */

/* x, y (n, C); stats (n, 2): mean and scale. */
void norm_forward(int64_t threads, int64_t centered, int64_t n, int64_t C, float eps, const stored *x,
                  const float *weight, stored *y, float *stats) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        const stored *from = x + row * C;
        stored *to = y + row * C;
        float mean = 0, squares = 0;
        if (centered) {
            SIMD_SUM(mean)
            for (int64_t i = 0; i < C; i++) mean += widen(from[i]);
            mean /= C;
        }
        SIMD_SUM(squares)
        for (int64_t i = 0; i < C; i++) squares += (widen(from[i]) - mean) * (widen(from[i]) - mean);
        float scale = 1 / sqrtf(squares / C + eps);
        SIMD
        for (int64_t i = 0; i < C; i++) to[i] = narrow((widen(from[i]) - mean) * scale * weight[i]);
        stats[2 * row] = mean, stats[2 * row + 1] = scale;
    }
}

/* Of one row: dx += what dy becomes, weight_grad += its share. */
static inline void norm_row_backward(int64_t centered, int64_t C, float mean, float scale, const stored *x,
                                     const float *weight, const stored *dy, stored *dx, float *weight_grad) {
    float sum = 0, along = 0;
    SIMD_SUMS(sum, along)
    for (int64_t i = 0; i < C; i++) {
        float hat = (widen(x[i]) - mean) * scale, g = widen(dy[i]);
        weight_grad[i] += g * hat;
        sum += g * weight[i];
        along += g * weight[i] * hat;
    }
    sum = centered ? sum / C : 0, along /= C;
    SIMD
    for (int64_t i = 0; i < C; i++) {
        float hat = (widen(x[i]) - mean) * scale;
        dx[i] = narrow(widen(dx[i]) + scale * (widen(dy[i]) * weight[i] - sum - hat * along));
    }
}

/* dx (n, C) comes with the gradient of the residual stream and is added to; weight_grads (threads, C) are 0. */
void norm_backward(int64_t threads, int64_t centered, int64_t n, int64_t C, const stored *x, const float *stats,
                   const float *weight, const stored *dy, stored *dx, float *weight_grads) {
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
    const float *cos, *sin;       /* (T, D / 2), or NULL */
} Heads;

/* One head of one token: normed where there is a weight, turned where there are angles, times `factor`. */
static inline void head_forward(const Heads *m, const stored *x, const float *weight, int64_t t, float factor,
                                stored *y, float *scale) {
    int64_t D = m->D, half = D / 2;
    float own = 1;
    if (weight) {
        float squares = 0;
        SIMD_SUM(squares)
        for (int64_t i = 0; i < D; i++) squares += widen(x[i]) * widen(x[i]);
        own = 1 / sqrtf(squares / D + m->eps);
    }
    *scale = own;
    if (!m->cos) {
        SIMD
        for (int64_t i = 0; i < D; i++) y[i] = narrow(widen(x[i]) * own * (weight ? weight[i] : 1) * factor);
        return;
    }
    const float *cos = m->cos + t * half, *sin = m->sin + t * half;
    own *= factor;
    SIMD
    for (int64_t i = 0; i < half; i++) {
        float a = widen(x[i]) * own * (weight ? weight[i] : 1);
        float b = widen(x[i + half]) * own * (weight ? weight[i + half] : 1);
        y[i] = narrow(a * cos[i] - b * sin[i]);
        y[i + half] = narrow(b * cos[i] + a * sin[i]);
    }
}

/* The other way: dy, already summed over the heads that share this one, to dx; weight_grad is added to. */
static inline void head_backward(const Heads *m, const stored *x, const float *weight, int64_t t, float factor,
                                 float scale, const float *dy, stored *dx, float *weight_grad) {
    int64_t D = m->D, half = D / 2;
    float g[D];
    if (m->cos) {
        const float *cos = m->cos + t * half, *sin = m->sin + t * half;
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
        for (int64_t i = 0; i < D; i++) dx[i] = narrow(g[i]);
        return;
    }
    float along = 0;
    SIMD_SUM(along)
    for (int64_t i = 0; i < D; i++) {
        float hat = widen(x[i]) * scale;
        weight_grad[i] += g[i] * hat;
        along += g[i] * weight[i] * hat;
    }
    along /= D;
    SIMD
    for (int64_t i = 0; i < D; i++) dx[i] = narrow(scale * (g[i] * weight[i] - widen(x[i]) * scale * along));
}

/* qkv (B T, (H + 2 K) D) to q, k, v (B, H, T, D), keys and values once for each query head; queries are divided by
   sqrt(D). scales (B T, H + K). */
void heads_forward(int64_t threads, const Heads *m, const stored *qkv, stored *q, stored *k, stored *v, float *scales) {
    int64_t H = m->H, K = m->K, D = m->D, T = m->T, group = H / K;
    float factor = 1 / sqrtf(D);
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * T; row++) {
        int64_t b = row / T, t = row % T;
        const stored *x = qkv + row * (H + 2 * K) * D;
        float *scale = scales + row * (H + K);
        for (int64_t h = 0; h < H; h++)
            head_forward(m, x + h * D, m->q_norm, t, factor, q + ((b * H + h) * T + t) * D, scale + h);
        for (int64_t j = 0; j < K; j++) {
            stored *key = k + ((b * H + j * group) * T + t) * D, *value = v + ((b * H + j * group) * T + t) * D;
            head_forward(m, x + (H + j) * D, m->k_norm, t, 1, key, scale + H + j);
            memcpy(value, x + (H + K + j) * D, D * sizeof(stored));
            for (int64_t again = 1; again < group; again++) {
                memcpy(key + again * T * D, key, D * sizeof(stored));
                memcpy(value + again * T * D, value, D * sizeof(stored));
            }
        }
    }
}

/* dq, dk, dv (B, H, T, D) to dqkv (B T, (H + 2 K) D); norm_grads (threads, 2, D) are 0. */
void heads_backward(int64_t threads, const Heads *m, const stored *qkv, const float *scales, const stored *dq,
                    const stored *dk, const stored *dv, stored *dqkv, float *norm_grads) {
    int64_t H = m->H, K = m->K, D = m->D, T = m->T, group = H / K;
    float factor = 1 / sqrtf(D);
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * T; row++) {
        int64_t b = row / T, t = row % T;
        const stored *x = qkv + row * (H + 2 * K) * D;
        stored *dx = dqkv + row * (H + 2 * K) * D;
        const float *scale = scales + row * (H + K);
        float *q_grad = norm_grads + omp_get_thread_num() * 2 * D, *k_grad = q_grad + D, key[D], value[D];
        for (int64_t h = 0; h < H; h++) {
            const stored *from = dq + ((b * H + h) * T + t) * D;
            SIMD
            for (int64_t i = 0; i < D; i++) key[i] = widen(from[i]);
            head_backward(m, x + h * D, m->q_norm, t, factor, scale[h], key, dx + h * D, q_grad);
        }
        for (int64_t j = 0; j < K; j++) {
            SIMD
            for (int64_t i = 0; i < D; i++) key[i] = value[i] = 0;
            for (int64_t h = j * group; h < (j + 1) * group; h++) {
                int64_t at = ((b * H + h) * T + t) * D;
                SIMD
                for (int64_t i = 0; i < D; i++) key[i] += widen(dk[at + i]), value[i] += widen(dv[at + i]);
            }
            head_backward(m, x + (H + j) * D, m->k_norm, t, 1, scale[H + j], key, dx + (H + j) * D, k_grad);
            SIMD
            for (int64_t i = 0; i < D; i++) dx[(H + K + j) * D + i] = narrow(value[i]);
        }
    }
}

/* Queries [start, start + size) of heads (B, H, size, D) to their places in tokens (B, T, H, D). */
void heads_to_tokens(int64_t threads, const Heads *m, int64_t start, int64_t size, const stored *heads, stored *tokens) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * size; row++) {
        int64_t b = row / size, t = row % size;
        for (int64_t h = 0; h < m->H; h++)
            memcpy(tokens + ((b * m->T + start + t) * m->H + h) * m->D, heads + ((b * m->H + h) * size + t) * m->D,
                   m->D * sizeof(stored));
    }
}

/* All of tokens (B, T, H, D) to heads (B, H, T, D). */
void tokens_to_heads(int64_t threads, const Heads *m, const stored *tokens, stored *heads) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < m->B * m->T; row++) {
        int64_t b = row / m->T, t = row % m->T;
        for (int64_t h = 0; h < m->H; h++)
            memcpy(heads + ((b * m->H + h) * m->T + t) * m->D, tokens + (row * m->H + h) * m->D, m->D * sizeof(stored));
    }
}

/* ---- causal softmax --------------------------------------------------------------------------------------- */

/* Scores (n, size, keys) of `size` queries, the first of them number `start`, to their weights, in place. A query
   sees the keys up to its own; what it does not see becomes 0. */
void softmax_forward(int64_t threads, int64_t n, int64_t start, int64_t size, int64_t keys, stored *scores) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n * size; row++) {
        stored *x = scores + row * keys;
        int64_t seen = start + row % size + 1;
        int64_t whole = (seen + LANES - 1) / LANES * LANES; /* no exponential is left over for one at a time */
        float top = widen(x[0]), sum = 0, e[whole];
        SIMD
        for (int64_t i = 0; i < seen; i++) e[i] = widen(x[i]);
        for (int64_t i = seen; i < whole; i++) e[i] = -INFINITY;
        SIMD_MAX(top)
        for (int64_t i = 0; i < whole; i++) top = e[i] > top ? e[i] : top;
        SIMD_SUM(sum)
        for (int64_t i = 0; i < whole; i++) sum += e[i] = exp_(e[i] - top);
        float factor = 1 / sum;
        SIMD
        for (int64_t i = 0; i < seen; i++) x[i] = narrow(e[i] * factor);
        memset(x + seen, 0, (keys - seen) * sizeof(stored));
    }
}

/* The gradient of the weights to that of the scores, in place. */
void softmax_backward(int64_t threads, int64_t n, int64_t start, int64_t size, int64_t keys, const stored *weights,
                      stored *grads) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n * size; row++) {
        const stored *w = weights + row * keys;
        stored *g = grads + row * keys;
        int64_t seen = start + row % size + 1;
        float along = 0;
        SIMD_SUM(along)
        for (int64_t i = 0; i < seen; i++) along += widen(w[i]) * widen(g[i]);
        SIMD
        for (int64_t i = 0; i < seen; i++) g[i] = narrow(widen(w[i]) * (widen(g[i]) - along));
        memset(g + seen, 0, (keys - seen) * sizeof(stored));
    }
}

/* ---- the activation of the feed-forward layer ------------------------------------------------------------- */

enum { GELU_TANH, SILU_GATED, RELU2_GATED };

/* gelu(x) = x s with s = (1 + tanh(u)) / 2 = sigmoid(2 u) */
static inline float gelu_gate(float x) { return sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }

/* inner (n, I), gated (n, 2 I) with the gates first, to out (n, I). */
void activation_forward(int64_t threads, int64_t kind, int64_t n, int64_t I, const stored *inner, stored *out) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        const stored *x = inner + row * (kind == GELU_TANH ? I : 2 * I), *up = x + I;
        stored *y = out + row * I;
        if (kind == GELU_TANH)
            SIMD
            for (int64_t i = 0; i < I; i++) y[i] = narrow(widen(x[i]) * gelu_gate(widen(x[i])));
        else if (kind == SILU_GATED)
            SIMD
            for (int64_t i = 0; i < I; i++) y[i] = narrow(widen(x[i]) * sigmoid(widen(x[i])) * widen(up[i]));
        else
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float positive = widen(x[i]) > 0 ? widen(x[i]) : 0;
                y[i] = narrow(positive * positive * widen(up[i]));
            }
    }
}

/* dout (n, I) to dinner; out is computed again, as keeping it would cost more memory than time. */
void activation_backward(int64_t threads, int64_t kind, int64_t n, int64_t I, const stored *inner, const stored *dout,
                         stored *out, stored *dinner) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        int64_t wide = kind == GELU_TANH ? I : 2 * I;
        const stored *x = inner + row * wide, *up = x + I, *dy = dout + row * I;
        stored *y = out + row * I, *dx = dinner + row * wide, *dup = dx + I;
        if (kind == GELU_TANH)
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = widen(x[i]), s = gelu_gate(v);
                float slope = 1.5957691216057308f * (1 + 0.134145f * v * v); /* of what the sigmoid is taken of */
                y[i] = narrow(v * s);
                dx[i] = narrow(widen(dy[i]) * s * (1 + v * (1 - s) * slope));
            }
        else if (kind == SILU_GATED)
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = widen(x[i]), u = widen(up[i]), g = widen(dy[i]), s = sigmoid(v);
                y[i] = narrow(v * s * u);
                dup[i] = narrow(g * v * s);
                dx[i] = narrow(g * u * s * (1 + v * (1 - s)));
            }
        else
            SIMD
            for (int64_t i = 0; i < I; i++) {
                float v = widen(x[i]) > 0 ? widen(x[i]) : 0, u = widen(up[i]), g = widen(dy[i]);
                y[i] = narrow(v * v * u);
                dup[i] = narrow(g * v * v);
                dx[i] = narrow(g * u * 2 * v);
            }
    }
}

/* ---- cross entropy ---------------------------------------------------------------------------------------- */

/* Logits (n, V) to their gradient, in place; losses (n,) in nats. A negative label is not counted: 0 in both.
   scratch (threads, V). */
void cross_entropy(int64_t threads, int64_t n, int64_t V, stored *logits, const int64_t *labels, float *losses,
                   float *scratch) {
    ROWS_IN_PARALLEL
    for (int64_t row = 0; row < n; row++) {
        stored *x = logits + row * V;
        int64_t label = labels[row];
        if (label < 0) {
            memset(x, 0, V * sizeof(stored));
            losses[row] = 0;
            continue;
        }
        float top = widen(x[0]), sum = 0, own = widen(x[label]), *e = scratch + omp_get_thread_num() * V;
        SIMD_MAX(top)
        for (int64_t i = 0; i < V; i++) top = widen(x[i]) > top ? widen(x[i]) : top;
        SIMD_SUM(sum)
        for (int64_t i = 0; i < V; i++) sum += e[i] = exp_(widen(x[i]) - top);
        losses[row] = logf(sum) - (own - top);
        float factor = 1 / sum;
        SIMD
        for (int64_t i = 0; i < V; i++) x[i] = narrow(e[i] * factor);
        x[label] = narrow(e[label] * factor - 1);
    }
}
