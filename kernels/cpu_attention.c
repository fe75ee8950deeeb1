// Attention on the CPU, as the Triton kernels compute it: a part of cpu.c, which includes it and has its element type and exp_.
//
// Products are made of tiles of TALL rows and WIDE columns that stay in registers, and take one operand in panels:
// WIDE columns side by side, row after row. BLOCK queries at a time hold their scores against all keys, so that the softmax is
// a plain one; what lies above the diagonal is left out tile by tile. A task is one head of keys of one row of the batch, or of
// one document, with all heads of queries that share it: no two tasks write the same numbers, whatever the number of threads.
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define TALL 6
#define WIDE (2 * LANES)
#define BLOCK (3 * WIDE)  // whole tiles either way
#define UP(n, to) (((n) + (to)-1) / (to) * (to))
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// c (TALL, WIDE) = [c +] a (TALL, depth) · b (depth, WIDE); a has any strides, b is a panel.
static __attribute__((noinline)) void tile(const float *a, long a_row, long a_column, const float *b, float *c, long c_row,
                                           long depth, int add) {
    vector sum[TALL][2];
#pragma GCC unroll 6
    for (int i = 0; i < TALL; i++)
        for (int half = 0; half < 2; half++) sum[i][half] = add ? *(const vector *)(c + i * c_row + half * LANES) : (vector){0};
    for (long n = 0; n < depth; n++, a += a_column, b += WIDE) {
        vector left = *(const vector *)b, right = *(const vector *)(b + LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TALL; i++) {
            sum[i][0] += a[i * a_row] * left;
            sum[i][1] += a[i * a_row] * right;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TALL; i++)
        for (int half = 0; half < 2; half++) *(vector *)(c + i * c_row + half * LANES) = sum[i][half];
}

// x (rows, columns), contiguous → panels of `depth` rows, zeros where x has none.
static void pack(const float *x, long rows, long columns, long depth, float *panels) {
    for (long j = 0; j < columns; j += WIDE, panels += depth * WIDE) {
        long width = columns - j < WIDE ? columns - j : WIDE;
        if (width < WIDE) memset(panels, 0, rows * WIDE * sizeof(float));
        for (long i = 0; i < rows; i++) memcpy(panels + i * WIDE, x + i * columns + j, width * sizeof(float));
        memset(panels + rows * WIDE, 0, (depth - rows) * WIDE * sizeof(float));
    }
}

// The same of x transposed, x (columns, rows) contiguous: panels of `rows` rows.
static void pack_transposed(const float *x, long rows, long columns, float *panels) {
    for (long j = 0; j < columns; j += WIDE, panels += rows * WIDE, x += WIDE * rows) {
        long width = columns - j < WIDE ? columns - j : WIDE;
        if (width < WIDE) memset(panels, 0, rows * WIDE * sizeof(float));
        for (long i = 0; i < rows; i++)
            for (long l = 0; l < width; l++) panels[i * WIDE + l] = x[l * rows + i];
    }
}

typedef struct {  // a tensor (batch, position, head, d) with d side by side
    element *data;
    long strides[3];
} tensor;

typedef struct {  // rotary's tables (period, d / 2), or NULL where nothing is turned
    const float *cosines, *sines;
    long period;
} angles;

// Where a task lies: `n` queries and `n_keys` keys from position `start` of row `batch`, all with one head of keys.
typedef struct {
    long batch, start, n, n_keys, kv_head;
} place;

// edges (tasks / kv_heads + 1,) of documents, or NULL: whole rows.
static place place_of(long task, long kv_heads, long seq, long kv_seq, const int32_t *edges) {
    long one = task / kv_heads, head = task % kv_heads;
    if (!edges) return (place){one, 0, seq, kv_seq, head};
    return (place){0, edges[one], edges[one + 1] - edges[one], edges[one + 1] - edges[one], head};
}

// The queries of a turn of a task: `rows` from its `first`, and how many keys the last of them sees.
typedef struct {
    long head, first, rows, most_keys;
} block;

static block block_of(place p, long turn, long group, int causal) {
    long first = turn / group * BLOCK, rows = p.n - first < BLOCK ? p.n - first : BLOCK;
    return (block){p.kv_head * group + turn % group, first, rows, causal ? first + rows : p.n_keys};
}

static inline element *at(tensor x, place p, long position, long head) {
    return x.data + p.batch * x.strides[0] + (p.start + position) * x.strides[1] + head * x.strides[2];
}

// factor · x from `first` on, turned to its positions → contiguous (rows, d), zeros up to a whole tile.
static void take(tensor x, place p, long first, long head, long rows, long d, float factor, angles turned, float *out) {
    memset(out + rows * d, 0, (UP(rows, TALL) - rows) * d * sizeof(float));
    for (long i = 0, half = d / 2; i < rows; i++, out += d) {
        const element *in = at(x, p, first + i, head);
        if (!turned.cosines) {
            for (long c = 0; c < d; c++) out[c] = load(in[c]) * factor;
            continue;
        }
        const float *cosines = turned.cosines + (p.start + first + i) % turned.period * half;
        const float *sines = turned.sines + (p.start + first + i) % turned.period * half;
        for (long c = 0; c < half; c++) {
            float a = load(in[c]) * factor, b = load(in[c + half]) * factor;
            out[c] = a * cosines[c] - b * sines[c];
            out[c + half] = b * cosines[c] + a * sines[c];
        }
    }
}

// The reverse: factor · x (rows, d), turned back from its positions, into `out`.
static void give(const float *x, long row, long rows, long d, float factor, angles turned, tensor out, place p, long first,
                 long head) {
    for (long i = 0, half = d / 2; i < rows; i++, x += row) {
        element *to = at(out, p, first + i, head);
        if (!turned.cosines) {
            for (long c = 0; c < d; c++) to[c] = round_(x[c] * factor);
            continue;
        }
        const float *cosines = turned.cosines + (p.start + first + i) % turned.period * half;
        const float *sines = turned.sines + (p.start + first + i) % turned.period * half;
        for (long c = 0; c < half; c++) {
            float a = x[c] * factor, b = x[c + half] * factor;
            to[c] = round_(a * cosines[c] + b * sines[c]);
            to[c + half] = round_(b * cosines[c] - a * sines[c]);
        }
    }
}

// rows (b.rows, d) · across, panels (d, keys) → scores, all that the mask leaves.
static void score(block b, const float *rows, const float *across, float *scores, long keys, long d, int causal) {
    for (long j = 0; j < b.most_keys; j += WIDE)
        for (long i = causal && j > b.first ? (j - b.first) / TALL * TALL : 0; i < b.rows; i += TALL)
            tile(rows + i * d, d, 1, across + j * d, scores + i * keys + j, keys, d, 0);
}

// weights (b.rows, keys) · down, panels (keys, d) → sums (b.rows, width).
static void weigh(block b, const float *weights, const float *down, float *sums, long keys, long d, int causal) {
    for (long c = 0; c < d; c += WIDE)
        for (long i = 0; i < b.rows; i += TALL) {
            long seen = causal && b.first + i + TALL < b.most_keys ? b.first + i + TALL : b.most_keys;
            tile(weights + i * keys, keys, 1, down + c * keys, sums + i * UP(d, WIDE) + c, UP(d, WIDE), seen, 0);
        }
}

// Floats of scratch memory that each thread needs for rows or documents of at most so many keys.
long attention_scratch(long longest, long d) {
    long keys = UP(longest, BLOCK), width = UP(d, WIDE);
    return 6 * keys * width + 2 * BLOCK * keys + 5 * BLOCK * width;
}

// q and out (B, seq, heads, d), k and v (B, kv_seq, kv_heads, d), lse (B, heads, seq).
void attention_forward(tensor q, tensor k, tensor v, tensor out, float *lse, const int32_t *edges, angles turned, long tasks,
                       long seq, long kv_seq, long heads, long kv_heads, long d, long longest, int causal, float scale,
                       float *scratch, int threads) {
    const angles unturned = {0};
    long group = heads / kv_heads, width = UP(d, WIDE);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks * longest * longest * d > 32768)
    for (long task = 0; task < tasks; task++) {
        place p = place_of(task, kv_heads, seq, kv_seq, edges);
        long keys = UP(p.n_keys, BLOCK);
        float *k_across = scratch + omp_get_thread_num() * attention_scratch(longest, d), *v_down = k_across + keys * width;
        float *kv_rows = v_down + keys * width, *q_rows = kv_rows + keys * width, *sums = q_rows + BLOCK * width;
        float *scores = sums + BLOCK * width;
        take(k, p, 0, p.kv_head, p.n_keys, d, 1.0f, turned, kv_rows);
        pack_transposed(kv_rows, d, p.n_keys, k_across);
        take(v, p, 0, p.kv_head, p.n_keys, d, 1.0f, unturned, kv_rows);
        pack(kv_rows, p.n_keys, d, keys, v_down);
        for (long turn = 0; turn < group * UP(p.n, BLOCK) / BLOCK; turn++) {
            block b = block_of(p, turn, group, causal);
            take(q, p, b.first, b.head, b.rows, d, scale, turned, q_rows);
            score(b, q_rows, k_across, scores, keys, d, causal);
            float *lse_rows = lse + (p.batch * heads + b.head) * seq + p.start + b.first, of_all[BLOCK];
            for (long i = 0; i < UP(b.rows, TALL); i++) {
                float *row = scores + i * keys, most = -INFINITY, sum = 0.0f;
                long seen = causal && b.first + i < b.most_keys ? b.first + i + 1 : b.most_keys;
#pragma omp simd reduction(max : most)
                for (long j = 0; j < seen; j++) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
                for (long j = 0; j < seen; j++) sum += row[j] = exp_(row[j] - most);
                for (long j = seen; j < UP(b.most_keys, WIDE); j++) row[j] = 0.0f;
                of_all[i] = sum;
                if (i < b.rows) lse_rows[i] = most + logf(sum);
            }
            weigh(b, scores, v_down, sums, keys, d, causal);
            for (long i = 0; i < b.rows; i++)
                give(sums + i * width, width, 1, d, 1.0f / of_all[i], unturned, out, p, b.first + i, b.head);
        }
    }
}

// P = exp(S − lse), dS = P ∘ (dO·Vᵀ − Σ dO ∘ O), dQ = scale · dS·K, dK = scale · dSᵀ·Q, dV = Pᵀ·dO.
void attention_backward(tensor dout, tensor q, tensor k, tensor v, tensor out, tensor dq, tensor dk, tensor dv, const float *lse,
                        const int32_t *edges, angles turned, long tasks, long seq, long kv_seq, long heads, long kv_heads,
                        long d, long longest, int causal, float scale, float *scratch, int threads) {
    const angles unturned = {0};
    long group = heads / kv_heads, width = UP(d, WIDE);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks * longest * longest * d > 32768)
    for (long task = 0; task < tasks; task++) {
        place p = place_of(task, kv_heads, seq, kv_seq, edges);
        long keys = UP(p.n_keys, BLOCK);
        float *k_across = scratch + omp_get_thread_num() * attention_scratch(longest, d), *v_across = k_across + keys * width;
        float *k_down = v_across + keys * width, *dk_sums = k_down + keys * width, *dv_sums = dk_sums + keys * width;
        float *kv_rows = dv_sums + keys * width, *q_rows = kv_rows + keys * width, *q_down = q_rows + BLOCK * width;
        float *dout_rows = q_down + BLOCK * width, *dout_down = dout_rows + BLOCK * width, *sums = dout_down + BLOCK * width;
        float *probabilities = sums + BLOCK * width, *slopes = probabilities + BLOCK * keys;
        take(v, p, 0, p.kv_head, p.n_keys, d, 1.0f, unturned, kv_rows);
        pack_transposed(kv_rows, d, p.n_keys, v_across);
        take(k, p, 0, p.kv_head, p.n_keys, d, 1.0f, turned, kv_rows);
        pack_transposed(kv_rows, d, p.n_keys, k_across);
        pack(kv_rows, p.n_keys, d, keys, k_down);
        memset(dk_sums, 0, 2 * keys * width * sizeof(float));
        for (long turn = 0; turn < group * UP(p.n, BLOCK) / BLOCK; turn++) {
            block b = block_of(p, turn, group, causal);
            take(q, p, b.first, b.head, b.rows, d, scale, turned, q_rows);
            take(dout, p, b.first, b.head, b.rows, d, 1.0f, unturned, dout_rows);
            pack(q_rows, b.rows, d, BLOCK, q_down);
            pack(dout_rows, b.rows, d, BLOCK, dout_down);
            score(b, q_rows, k_across, probabilities, keys, d, causal);
            score(b, dout_rows, v_across, slopes, keys, d, causal);
            const float *lse_rows = lse + (p.batch * heads + b.head) * seq + p.start + b.first;
            for (long i = 0; i < UP(b.rows, TALL); i++) {
                const element *out_row = at(out, p, b.first + i, b.head);
                float *row = probabilities + i * keys, *slope = slopes + i * keys, delta = 0.0f;
                float log_of_all = i < b.rows ? lse_rows[i] : 0.0f;
                long seen = causal && b.first + i < b.most_keys ? b.first + i + 1 : b.most_keys;
                for (long c = 0; i < b.rows && c < d; c++) delta += dout_rows[i * d + c] * load(out_row[c]);
#pragma omp simd
                for (long j = 0; j < seen; j++) {
                    row[j] = exp_(row[j] - log_of_all);
                    slope[j] = row[j] * (slope[j] - delta);
                }
                for (long j = seen; j < UP(b.most_keys, BLOCK); j++) row[j] = slope[j] = 0.0f;
            }
            weigh(b, slopes, k_down, sums, keys, d, causal);
            give(sums, width, b.rows, d, scale, turned, dq, p, b.first, b.head);
            for (long c = 0; c < d; c += WIDE)
                for (long j = 0; j < b.most_keys; j += TALL) {
                    long i = causal && j > b.first ? j - b.first : 0;  // the first query that sees key j
                    const float *q_panel = q_down + c * BLOCK + i * WIDE, *dout_panel = dout_down + c * BLOCK + i * WIDE;
                    tile(slopes + i * keys + j, 1, keys, q_panel, dk_sums + j * width + c, width, b.rows - i, 1);
                    tile(probabilities + i * keys + j, 1, keys, dout_panel, dv_sums + j * width + c, width, b.rows - i, 1);
                }
        }
        give(dk_sums, width, p.n_keys, d, 1.0f, turned, dk, p, 0, p.kv_head);
        give(dv_sums, width, p.n_keys, d, 1.0f, unturned, dv, p, 0, p.kv_head);
    }
}
