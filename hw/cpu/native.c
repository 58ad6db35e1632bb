/* Decode on a CPU in float32, one call for what takes torch several: norms, rotation and cache write, paged attention,
 * silu(gate) * up. Each function does what hw/cpu/ops.py says of its namesake; that file is the oracle.
 * Compiled once per machine by hw/cpu/native.py; all pointers are to contiguous rows, sizes are in elements. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float sum_of_squares(const float *x, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

/* residual_out = residual + x, out = residual_out / rms * weight; x may be NULL (plain norm, residual_out unused). */
void add_rms_norm(const float *x, const float *residual, const float *weight, float *residual_out, float *out,
                  long rows, long n, float eps) {
    for (long r = 0; r < rows; r++) {
        const float *h = residual + r * n;
        if (x) {
            float *to = residual_out + r * n;
            for (long i = 0; i < n; i++) to[i] = h[i] + x[r * n + i];
            h = to;
        }
        const float scale = 1.0f / sqrtf(sum_of_squares(h, n) / n + eps);
        for (long i = 0; i < n; i++) out[r * n + i] = h[i] * scale * weight[i];
    }
}

void silu_mul(const float *gate_up, float *out, long rows, long n) {
    for (long r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * n, *up = gate + n;
        for (long i = 0; i < n; i++) out[r * n + i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* One head: optional RMSNorm over d, then the half-split rotation of the first 2 * half elements. */
INLINE void turn(const float *x, float *to, const float *cosine, const float *norm, float eps, long d, long half) {
    const float *sine = cosine + half;
    float scale = 1.0f;
    if (norm) scale = 1.0f / sqrtf(sum_of_squares(x, d) / d + eps);
    for (long i = 0; i < half; i++) {
        const float a = norm ? x[i] * scale * norm[i] : x[i];
        const float b = norm ? x[i + half] * scale * norm[i + half] : x[i + half];
        to[i] = a * cosine[i] - b * sine[i];
        to[i + half] = b * cosine[i] + a * sine[i];
    }
    for (long i = 2 * half; i < d; i++) to[i] = norm ? x[i] * scale * norm[i] : x[i];
}

/* qkv [tokens, (hq + 2 hkv) d] -> q [tokens, hq, d]; K and V to the caches [blocks, hkv, block_size, d] at slots. */
void rope_cache(const float *qkv, float *q, float *k_cache, float *v_cache, const float *rope, const int32_t *positions,
                const int32_t *slots, const float *q_norm, const float *k_norm, float eps, long tokens, long hq,
                long hkv, long d, long half, long block_size) {
    for (long t = 0; t < tokens; t++) {
        const float *row = qkv + t * (hq + 2 * hkv) * d;
        const float *cosine = rope + (long)positions[t] * 2 * half;
        for (long h = 0; h < hq; h++) turn(row + h * d, q + (t * hq + h) * d, cosine, q_norm, eps, d, half);
        if (slots[t] < 0) continue;
        const long block = slots[t] / block_size, offset = slots[t] % block_size;
        for (long h = 0; h < hkv; h++) {
            const long at = ((block * hkv + h) * block_size + offset) * d;
            turn(row + (hq + h) * d, k_cache + at, cosine, k_norm, eps, d, half);
            memcpy(v_cache + at, row + (hq + hkv + h) * d, d * sizeof(float));
        }
    }
}

/* One sequence, one token, one head: query [d] over the keys [first, length) of K/V head h. scores: [length].
 * Whole blocks at a time: a division per position would cost more than its product. */
INLINE void attend(const float *query, const float *k_cache, const float *v_cache, const int32_t *table, long first,
                   long length, long h, long hkv, const long d, long block_size, float scale, float *out,
                   float *scores) {
    float top = -INFINITY, sum = 0;
    for (long b = first / block_size; b * block_size < length; b++) {
        const long from = first > b * block_size ? first : b * block_size;
        const long to = length < (b + 1) * block_size ? length : (b + 1) * block_size;
        const float *keys = k_cache + (((long)table[b] * hkv + h) * block_size - b * block_size) * d;
        for (long p = from; p < to; p++) {
            float dot = 0;
            for (long i = 0; i < d; i++) dot += query[i] * keys[p * d + i];
            scores[p] = dot * scale;
            top = scores[p] > top ? scores[p] : top;
        }
    }
    for (long p = first; p < length; p++) scores[p] = expf(scores[p] - top);
    for (long p = first; p < length; p++) sum += scores[p];
    float result[d];
    for (long i = 0; i < d; i++) result[i] = 0;
    for (long b = first / block_size; b * block_size < length; b++) {
        const long from = first > b * block_size ? first : b * block_size;
        const long to = length < (b + 1) * block_size ? length : (b + 1) * block_size;
        const float *values = v_cache + (((long)table[b] * hkv + h) * block_size - b * block_size) * d;
        for (long p = from; p < to; p++)
            for (long i = 0; i < d; i++) result[i] += scores[p] * values[p * d + i];
    }
    for (long i = 0; i < d; i++) out[i] = result[i] / sum;
}

/* The sequences of a step, one token each: q, out [sequences, hq, d]; tables [state rows, max_blocks].
 * window < 0: none. scores: scratch of threads * stride, stride >= the longest length. */
void decode_attention(const float *q, const float *k_cache, const float *v_cache, const int32_t *tables,
                      const int32_t *rows, const int32_t *lengths, float *out, float *scores, long sequences,
                      long max_blocks, long hq, long hkv, long d, long block_size, long window, long stride,
                      long threads, float scale) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (long work = 0; work < sequences * hq; work++) {
        const long s = work / hq, head = work % hq, h = head / (hq / hkv);
        const long length = lengths[s], first = window >= 0 && length > window ? length - window : 0;
        const int32_t *table = tables + (long)rows[s] * max_blocks;
        float *scratch = scores + omp_get_thread_num() * stride;
        const float *query = q + work * d;
        float *result = out + work * d;
        if (d == 64)
            attend(query, k_cache, v_cache, table, first, length, h, hkv, 64, block_size, scale, result, scratch);
        else if (d == 128)
            attend(query, k_cache, v_cache, table, first, length, h, hkv, 128, block_size, scale, result, scratch);
        else
            attend(query, k_cache, v_cache, table, first, length, h, hkv, d, block_size, scale, result, scratch);
    }
}

/* ---------------------------------------------------------------------------------------------- product
 * y [n] = w[n, k] x (+ bias), shared among threads by rows of w. */

INLINE float widen(uint16_t half) { /* bfloat16 to float32 */
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One row of x against w in bfloat16: the product is bound by reading w, so half the bytes is twice the speed. */
void product_half(const float *x, const uint16_t *w, const float *bias, float *y, long n, long k, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long block = 0; block < n / 4; block++) {
        const uint16_t *r = w + block * 4 * k;
        float a = 0, b = 0, c = 0, d = 0;
        for (long i = 0; i < k; i++) {
            a += widen(r[i]) * x[i];
            b += widen(r[i + k]) * x[i];
            c += widen(r[i + 2 * k]) * x[i];
            d += widen(r[i + 3 * k]) * x[i];
        }
        float *to = y + block * 4;
        to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        if (bias)
            for (long j = 0; j < 4; j++) to[j] += bias[block * 4 + j];
    }
}
