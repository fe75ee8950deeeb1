// The fused operations on the CPU, as the Triton kernels compute them: one pass over memory, arithmetic in fp32, rounded once.
// kernels/cpu.py compiles this file on first use, once for each element type (-DBF16), and says where the formulas are.
// Loops are written so that gcc and clang vectorise them. Threads are torch's own: GOMP_* is found in torch's OpenMP.
// Rows are dealt to threads in fixed blocks, so the same number of threads gives the same bits.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef BF16
typedef uint16_t element;
static inline float load(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static inline element round_(float x) {  // to nearest, ties to even; nan stays nan
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
}
#else
typedef float element;
static inline float load(element x) { return x; }
static inline element round_(float x) { return x; }
#endif

#define PRAGMA(text) _Pragma(#text)
#define PARALLEL(work) PRAGMA(omp parallel for schedule(static) num_threads(threads) if ((work) > 32768))

// e^x within 2 ulp: 2^n · e^r with r in ±ln(2)/2, e^r by its series (Cephes' coefficients). nan stays nan; inf above ln(2^128),
// 0 below -87: the exponent of 2^(n-1), which alone never overflows, is 0 there.
static inline float exp_(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -87.3f ? -87.3f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 126) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power * 2.0f;
}

void swiglu_forward(const element *gate_up, element *y, long rows, long d_ff, int threads) {
    PARALLEL(rows * d_ff)
    for (long row = 0; row < rows; row++) {
        const element *gate = gate_up + row * 2 * d_ff, *up = gate + d_ff;
        element *out = y + row * d_ff;
#pragma omp simd
        for (long i = 0; i < d_ff; i++) {
            float g = load(gate[i]);
            out[i] = round_(g / (1.0f + exp_(-g)) * load(up[i]));
        }
    }
}

void swiglu_backward(const element *dy, const element *gate_up, element *dgate_up, long rows, long d_ff, int threads) {
    PARALLEL(rows * d_ff)
    for (long row = 0; row < rows; row++) {
        const element *gate = gate_up + row * 2 * d_ff, *up = gate + d_ff, *d = dy + row * d_ff;
        element *dgate = dgate_up + row * 2 * d_ff, *dup = dgate + d_ff;
#pragma omp simd
        for (long i = 0; i < d_ff; i++) {
            float g = load(gate[i]), sigmoid = 1.0f / (1.0f + exp_(-g)), dyi = load(d[i]);
            dup[i] = round_(dyi * (g * sigmoid));  // no product overflows before the sigmoid makes it small
            dgate[i] = round_(dyi * (load(up[i]) * (sigmoid * (1.0f + g * (1.0f - sigmoid)))));
        }
    }
}

// Where a head of x with these strides begins, row = batch · seq + position.
static inline const element *head_of(const element *x, long row, long seq, long head, long stride_batch, long stride_seq,
                                     long stride_head) {
    return x + row / seq * stride_batch + row % seq * stride_seq + head * stride_head;
}

// x of (rows, heads, 2·half) with these strides, row = batch · seq + position; out contiguous; tables (seq, half).
void rotary(const element *x, element *out, const float *cosines, const float *sines, long batch, long seq, long heads,
            long half, long stride_batch, long stride_seq, long stride_head, float sign, int threads) {
    PARALLEL(batch * seq * heads * half)
    for (long row = 0; row < batch * seq; row++) {
        long position = row % seq;
        const float *c = cosines + position * half, *s = sines + position * half;
        for (long head = 0; head < heads; head++) {
            const element *x1 = head_of(x, row, seq, head, stride_batch, stride_seq, stride_head), *x2 = x1 + half;
            element *out1 = out + (row * heads + head) * 2 * half, *out2 = out1 + half;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = load(x1[i]), b = load(x2[i]), turn = sign * s[i];
                out1[i] = round_(a * c[i] - b * turn);
                out2[i] = round_(b * c[i] + a * turn);
            }
        }
    }
}

// RMSNorm of each head, then rotary: x, out and tables as in rotary; gain (2·half,).
void norm_rotary_forward(const element *x, const float *gain, const float *cosines, const float *sines, element *out, long batch,
                         long seq, long heads, long half, long stride_batch, long stride_seq, long stride_head, float eps,
                         int threads) {
    const float *gain2 = gain + half;
    PARALLEL(batch * seq * heads * half)
    for (long row = 0; row < batch * seq; row++) {
        long position = row % seq;
        const float *c = cosines + position * half, *s = sines + position * half;
        for (long head = 0; head < heads; head++) {
            const element *x1 = head_of(x, row, seq, head, stride_batch, stride_seq, stride_head), *x2 = x1 + half;
            element *out1 = out + (row * heads + head) * 2 * half, *out2 = out1 + half;
            float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (long i = 0; i < 2 * half; i++) squares += load(x1[i]) * load(x1[i]);
            float scale = 1.0f / sqrtf(squares / (2 * half) + eps);
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = load(x1[i]) * scale * gain[i], b = load(x2[i]) * scale * gain2[i];
                out1[i] = round_(a * c[i] - b * s[i]);
                out2[i] = round_(b * c[i] + a * s[i]);
            }
        }
    }
}

// dout and dx contiguous. dgain is (threads, 2·half): what each thread has summed.
void norm_rotary_backward(const element *dout, const element *x, const float *gain, const float *cosines, const float *sines,
                          element *dx, float *dgain, long batch, long seq, long heads, long half, long stride_batch,
                          long stride_seq, long stride_head, float eps, int threads) {
    const float *gain2 = gain + half;
    long rows = batch * seq;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        float *mine1 = dgain + thread * 2 * half, *mine2 = mine1 + half;
        memset(mine1, 0, 2 * half * sizeof(float));
        for (long row = rows * thread / threads; row < rows * (thread + 1) / threads; row++) {
            long position = row % seq;
            const float *c = cosines + position * half, *s = sines + position * half;
            for (long head = 0; head < heads; head++) {
                const element *x1 = head_of(x, row, seq, head, stride_batch, stride_seq, stride_head), *x2 = x1 + half;
                const element *d1 = dout + (row * heads + head) * 2 * half, *d2 = d1 + half;
                element *dx1 = dx + (row * heads + head) * 2 * half, *dx2 = dx1 + half;
                float squares = 0.0f, projection = 0.0f;
#pragma omp simd reduction(+ : squares)
                for (long i = 0; i < 2 * half; i++) squares += load(x1[i]) * load(x1[i]);
                float scale = 1.0f / sqrtf(squares / (2 * half) + eps);
#pragma omp simd reduction(+ : projection)
                for (long i = 0; i < half; i++) {
                    float g1 = load(d1[i]), g2 = load(d2[i]), n1 = load(x1[i]) * scale, n2 = load(x2[i]) * scale;
                    float turned1 = g1 * c[i] + g2 * s[i], turned2 = g2 * c[i] - g1 * s[i];
                    mine1[i] += turned1 * n1;
                    mine2[i] += turned2 * n2;
                    projection += turned1 * gain[i] * n1 + turned2 * gain2[i] * n2;
                }
                projection /= 2 * half;
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    float g1 = load(d1[i]), g2 = load(d2[i]);
                    dx1[i] = round_(((g1 * c[i] + g2 * s[i]) * gain[i] - load(x1[i]) * scale * projection) * scale);
                    dx2[i] = round_(((g2 * c[i] - g1 * s[i]) * gain2[i] - load(x2[i]) * scale * projection) * scale);
                }
            }
        }
    }
}

// residual may be NULL; else residual_out = x + residual is normalised. rstd (rows,) is kept for the backward pass.
void rms_norm_forward(const element *x, const element *residual, const float *weight, element *y, element *residual_out,
                      float *rstd, long rows, long width, float eps, int threads) {
    PARALLEL(rows * width)
    for (long row = 0; row < rows; row++) {
        const element *in = x + row * width;
        if (residual) {
            element *sum = residual_out + row * width;
#pragma omp simd
            for (long i = 0; i < width; i++) sum[i] = round_(load(in[i]) + load(residual[row * width + i]));
            in = sum;
        }
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < width; i++) squares += load(in[i]) * load(in[i]);
        float scale = rstd[row] = 1.0f / sqrtf(squares / width + eps);
        element *out = y + row * width;
#pragma omp simd
        for (long i = 0; i < width; i++) out[i] = round_(load(in[i]) * scale * weight[i]);
    }
}

// dresidual may be NULL. dweight is (threads, width): what each thread has summed.
void rms_norm_backward(const element *dy, const element *dresidual, const element *x, const float *weight, const float *rstd,
                       element *dx, float *dweight, long rows, long width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        float *mine = dweight + thread * width;
        memset(mine, 0, width * sizeof(float));
        for (long row = rows * thread / threads; row < rows * (thread + 1) / threads; row++) {
            const element *in = x + row * width, *d = dy + row * width, *also = dresidual ? dresidual + row * width : 0;
            float scale = rstd[row], projection = 0.0f;
#pragma omp simd reduction(+ : projection)
            for (long i = 0; i < width; i++) {
                float normed = load(in[i]) * scale, dyi = load(d[i]);
                mine[i] += dyi * normed;
                projection += dyi * weight[i] * normed;
            }
            projection /= width;
            element *out = dx + row * width;
            if (also) {
#pragma omp simd
                for (long i = 0; i < width; i++)
                    out[i] = round_((load(d[i]) * weight[i] - load(in[i]) * scale * projection) * scale + load(also[i]));
            } else {
#pragma omp simd
                for (long i = 0; i < width; i++)
                    out[i] = round_((load(d[i]) * weight[i] - load(in[i]) * scale * projection) * scale);
            }
        }
    }
}

// The loss of each row of fp32 logits and, unless dlogits is NULL, row_scale · d loss / d logits. row_scale may be NULL.
void cross_entropy(const float *logits, const int64_t *targets, const float *row_scale, float *loss, element *dlogits, long rows,
                   long vocab, long ignore_index, float z_loss, int threads) {
    PARALLEL(rows * vocab)
    for (long row = 0; row < rows; row++) {
        const float *in = logits + row * vocab;
        int64_t target = targets[row];
        int kept = target != ignore_index;
        float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (long i = 0; i < vocab; i++) most = in[i] > most ? in[i] : most;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < vocab; i++) sum += exp_(in[i] - most);
        float log_sum = logf(sum), lse = most + log_sum;  // most may be so large that lse is no more than it
        int inside = target >= 0 && target < vocab;
        loss[row] = kept ? log_sum - ((inside ? in[target] : NAN) - most) + z_loss * lse * lse : 0.0f;
        if (!dlogits) continue;
        element *out = dlogits + row * vocab;
        float scale = !kept ? 0.0f : row_scale ? row_scale[row] : 1.0f, slope = scale * (1.0f + 2.0f * z_loss * lse) / sum;
        if (!kept) {
            memset(out, 0, vocab * sizeof(element));
            continue;
        }
#pragma omp simd
        for (long i = 0; i < vocab; i++) out[i] = round_(exp_(in[i] - most) * slope);
        if (inside) out[target] = round_(exp_(in[target] - most) * slope - scale);
    }
}

#include "cpu_attention.c"
