/* Decode on a CPU in float32, one call for what takes torch several: norms, rotation and cache write, paged attention,
 * silu(gate) * up. Each function does what hw/cpu/ops.py says of its namesake; that file is the oracle.
 * Compiled once per machine by hw/cpu/native.py; all pointers are to contiguous rows, sizes are in elements. */
#include <math.h>
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

/* One sequence, one token: q [hq, d] over its keys [first, length). scores: [group, length]. */
INLINE void attend(const float *q, const float *k_cache, const float *v_cache, const int32_t *table, long first,
                   long length, long hq, long hkv, const long d, long block_size, float scale, float *out,
                   float *scores) {
    const long group = hq / hkv;
    for (long h = 0; h < hkv; h++) {
        const float *query = q + h * group * d;
        float *to = out + h * group * d;
        for (long p = first; p < length; p++) {
            const float *key = k_cache + (((long)table[p / block_size] * hkv + h) * block_size + p % block_size) * d;
            for (long g = 0; g < group; g++) {
                float dot = 0;
                for (long i = 0; i < d; i++) dot += query[g * d + i] * key[i];
                scores[g * length + p] = dot * scale;
            }
        }
        for (long g = 0; g < group; g++) {
            float *s = scores + g * length, top = s[first], sum = 0;
            for (long p = first; p < length; p++) top = s[p] > top ? s[p] : top;
            for (long p = first; p < length; p++) s[p] = expf(s[p] - top);
            for (long p = first; p < length; p++) sum += s[p];
            for (long p = first; p < length; p++) s[p] /= sum;
            for (long i = 0; i < d; i++) to[g * d + i] = 0;
        }
        for (long p = first; p < length; p++) {
            const float *value = v_cache + (((long)table[p / block_size] * hkv + h) * block_size + p % block_size) * d;
            for (long g = 0; g < group; g++) {
                const float s = scores[g * length + p];
                for (long i = 0; i < d; i++) to[g * d + i] += s * value[i];
            }
        }
    }
}

/* Sequences [from, to) of a step, one token each: q, out [sequences, hq, d]; tables [state rows, max_blocks].
 * window < 0: none. scores: scratch of group * (longest length). */
void decode_attention(const float *q, const float *k_cache, const float *v_cache, const int32_t *tables,
                      const int32_t *rows, const int32_t *lengths, float *out, float *scores, long from, long to,
                      long max_blocks, long hq, long hkv, long d, long block_size, long window, float scale) {
    for (long s = from; s < to; s++) {
        const long length = lengths[s], first = window >= 0 && length > window ? length - window : 0;
        const int32_t *table = tables + (long)rows[s] * max_blocks;
        const float *query = q + s * hq * d;
        float *result = out + s * hq * d;
        if (d == 64)
            attend(query, k_cache, v_cache, table, first, length, hq, hkv, 64, block_size, scale, result, scores);
        else if (d == 128)
            attend(query, k_cache, v_cache, table, first, length, hq, hkv, 128, block_size, scale, result, scores);
        else
            attend(query, k_cache, v_cache, table, first, length, hq, hkv, d, block_size, scale, result, scores);
    }
}
