/* Encode, decode and correlate for the CPU: one pass over the matrix, tiles gathered and scattered in registers.
 *
 * A block is LANES neighbouring tiles of one tile row. Its p·q entries are held as p·q vectors with one tile a lane:
 * a matrix row is LANES·q consecutive numbers, and splitting it by position modulo q (`split`) gives the q vectors.
 *   encode     X̂[k] = Σ_e E[k][e]·v[e]          one store a channel
 *   decode     v[e] = Σ_k D[k][e]·Ŷ[k]          one load a channel, then `join` and whole rows out
 *   correlate  C[k][e] = Σ_blocks X̂[k]·v[e]     lanes summed at the end
 * Arithmetic is float32 whatever the storage (float32 or bfloat16, rounded to nearest even).
 *
 * GCC/Clang vector extensions; on x86-64 the row loops are compiled for several instruction sets and chosen at load.
 * Threads are OpenMP's. The module is linked without an OpenMP runtime of its own, on purpose: it takes the one torch
 * has loaded, so that there is one pool of threads. It is therefore importable only after torch.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include "vectors.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#define MAX_PQ 64 /* tiles of up to 8×8 */

/* Sizes are in numbers, not bytes. matrix: (batch, rows, columns), the last dimension dense.
 * encoded: channel k of tile row i starts at k·channel + i·tiles, where i counts from `first`. */
typedef struct {
    char *matrix, *encoded;
    float *factor;     /* (rank, p, q), or (rank, p, q, wide); for correlate the sums, (threads, rank, p, q, LANES or wide) */
    const float *bias; /* (columns) or NULL; decode only */
    int64_t rows, columns, sample_stride, row_stride;
    int64_t tile_rows, tiles; /* tile rows a sample, tiles a tile row */
    int64_t channel, first, count;
    int64_t wide; /* 0: one factor; else one for each tile of a row, side by side, up to a multiple of LANES */
    int rank, p, q, type;
} job;

INLINE vec even(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
INLINE vec odd(vec a, vec b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
INLINE vec low(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE vec high(vec a, vec b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* q vectors of consecutive numbers → vector b holds those at positions b, b + q, b + 2q, … (q = 1, 2, 4, 8). */
INLINE void split(vec *x, const int q) {
    vec t[8];
    if (q == 1) return;
    if (q == 2) { t[0] = even(x[0], x[1]); t[1] = odd(x[0], x[1]); memcpy(x, t, 2 * sizeof(vec)); return; }
    if (q == 4) {
        vec e0 = even(x[0], x[1]), e1 = even(x[2], x[3]), o0 = odd(x[0], x[1]), o1 = odd(x[2], x[3]);
        x[0] = even(e0, e1); x[2] = odd(e0, e1); x[1] = even(o0, o1); x[3] = odd(o0, o1);
        return;
    }
    for (int i = 0; i < 4; i++) { t[i] = even(x[2 * i], x[2 * i + 1]); t[4 + i] = odd(x[2 * i], x[2 * i + 1]); }
    split(t, 4);
    split(t + 4, 4);
    for (int i = 0; i < 4; i++) { x[2 * i] = t[i]; x[2 * i + 1] = t[4 + i]; }
}

/* The inverse of `split`. */
INLINE void join(vec *x, const int q) {
    vec t[8];
    if (q == 1) return;
    if (q == 2) { t[0] = low(x[0], x[1]); t[1] = high(x[0], x[1]); memcpy(x, t, 2 * sizeof(vec)); return; }
    if (q == 4) {
        vec e0 = low(x[0], x[2]), e1 = high(x[0], x[2]), o0 = low(x[1], x[3]), o1 = high(x[1], x[3]);
        x[0] = low(e0, o0); x[1] = high(e0, o0); x[2] = low(e1, o1); x[3] = high(e1, o1);
        return;
    }
    for (int i = 0; i < 4; i++) { t[i] = x[2 * i]; t[4 + i] = x[2 * i + 1]; }
    join(t, 4);
    join(t + 4, 4);
    for (int i = 0; i < 4; i++) { x[2 * i] = low(t[i], t[4 + i]); x[2 * i + 1] = high(t[i], t[4 + i]); }
}

/* The p·q vectors of LANES tiles from tile `at` of tile row `i`; what lies over an edge is zero. */
INLINE void gather(const job *w, int64_t i, int64_t at, vec *v, const int p, const int q) {
    const int64_t row = i % w->tile_rows * p, column = at * q, width = w->columns - column;
    const int64_t start = i / w->tile_rows * w->sample_stride + column;
    for (int a = 0; a < p; a++) {
        vec *x = v + a * q;
        const int64_t from = start + (row + a) * w->row_stride;
        for (int b = 0; b < q; b++) {
            const int64_t left = row + a < w->rows ? width - b * LANES : 0;
            if (left >= LANES) x[b] = load(w->matrix, from + b * LANES, w->type);
            else if (left > 0) x[b] = load_part(w->matrix, from + b * LANES, w->type, left);
            else x[b] = (vec){0};
        }
        split(x, q);
    }
}

INLINE void store_channel(const job *w, int k, int64_t i, int64_t at, vec v) {
    const int64_t to = k * w->channel + i * w->tiles + at, n = w->tiles - at;
    if (n >= LANES) store(w->encoded, to, w->type, v);
    else store_part(w->encoded, to, w->type, v, n);
}

INLINE void encode_block(const job *w, int64_t i, int64_t at, const int p, const int q) {
    vec v[MAX_PQ];
    gather(w, w->first + i, at, v, p, q);
    const int pq = p * q;
    int k = 0;
    for (; k + 4 <= w->rank; k += 4) { /* four sums at a time hide the latency of one */
        const float *e = w->factor + (int64_t)k * pq;
        vec s0 = e[0] * v[0], s1 = e[pq] * v[0], s2 = e[2 * pq] * v[0], s3 = e[3 * pq] * v[0];
        for (int j = 1; j < pq; j++) {
            const vec x = v[j];
            s0 += e[j] * x; s1 += e[pq + j] * x; s2 += e[2 * pq + j] * x; s3 += e[3 * pq + j] * x;
        }
        store_channel(w, k, i, at, s0);
        store_channel(w, k + 1, i, at, s1);
        store_channel(w, k + 2, i, at, s2);
        store_channel(w, k + 3, i, at, s3);
    }
    for (; k < w->rank; k++) {
        const float *e = w->factor + (int64_t)k * pq;
        vec s = e[0] * v[0];
        for (int j = 1; j < pq; j++) s += e[j] * v[j];
        store_channel(w, k, i, at, s);
    }
}

/* Sums that stay in registers are named ones: GCC keeps an array that is indexed in a loop in memory. */
#define EACH1(F) F(0)
#define EACH4(F) F(0) F(1) F(2) F(3)
#define EACH16(F) EACH4(F) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15)
#define CLEAR(J) vec s##J = {0};
#define DECODE(J) s##J += d[J] * y;
#define KEEP(J) v[j + J] = s##J;
#define CORRELATE(J) s##J += x * v[block][j + J];
#define ADD(J) *(vec *)(to + (j + J) * LANES) += s##J;

INLINE vec channel_block(const job *w, int k, int64_t i, int64_t at) {
    const int64_t from = k * w->channel + i * w->tiles + at, n = w->tiles - at;
    return n >= LANES ? load(w->encoded, from, w->type) : load_part(w->encoded, from, w->type, n);
}

INLINE void prefetch(const job *w, int k, int64_t i, int64_t at) {
    const int64_t from = k * w->channel + i * w->tiles + at;
    __builtin_prefetch(w->encoded + (w->type == BFLOAT16 ? 2 : 4) * from);
}

/* The inverse of `gather`, with the bias: what lies over an edge is not written. */
INLINE void scatter(const job *w, int64_t i, int64_t at, vec *v, const int p, const int q) {
    const int64_t row = i % w->tile_rows * p, column = at * q, width = w->columns - column;
    const int64_t start = i / w->tile_rows * w->sample_stride + column;
    for (int a = 0; a < p && row + a < w->rows; a++) {
        vec *x = v + a * q;
        join(x, q);
        const int64_t to = start + (row + a) * w->row_stride;
        for (int b = 0; b < q; b++) {
            const int64_t left = width - b * LANES;
            if (left <= 0) break;
            if (left >= LANES) {
                if (w->bias) x[b] += *(const vec *)(w->bias + column + b * LANES);
                store(w->matrix, to + b * LANES, w->type, x[b]);
            } else {
                if (w->bias) x[b] += load_part((const char *)w->bias, column + b * LANES, FLOAT32, left);
                store_part(w->matrix, to + b * LANES, w->type, x[b], left);
            }
        }
    }
}

INLINE void decode_block(const job *w, int64_t i, int64_t at, const int p, const int q) {
    vec v[MAX_PQ];
    const int pq = p * q;
    int j = 0;
#define DECODE_ENTRIES(N)                                                 \
    for (; j + N <= pq; j += N) {                                         \
        EACH##N(CLEAR)                                                    \
        for (int k = 0; k < w->rank; k++) {                               \
            const float *d = w->factor + (int64_t)k * pq + j;             \
            const vec y = channel_block(w, k, i, at);                     \
            EACH##N(DECODE)                                               \
        }                                                                 \
        EACH##N(KEEP)                                                     \
    }
    DECODE_ENTRIES(16)
    DECODE_ENTRIES(4)
    DECODE_ENTRIES(1)
    scatter(w, w->first + i, at, v, p, q);
}

/* One tile row at a time, in runs of blocks that stay in the first cache together with nothing else. */
#define RUN 8
#define AHEAD 4
INLINE void correlate_row(const job *w, int64_t i, float *sums, const int p, const int q) {
    vec v[RUN][MAX_PQ];
    const int pq = p * q;
    for (int64_t at = 0; at < w->tiles; at += RUN * LANES) {
        int blocks = 0;
        for (; blocks < RUN && at + blocks * LANES < w->tiles; blocks++)
            gather(w, w->first + i, at + blocks * LANES, v[blocks], p, q);
        for (int k = 0; k < w->rank; k++) {
            float *to = sums + ((int64_t)k * pq) * LANES;
            int j = 0;
            if (k + AHEAD < w->rank) /* a short run of each channel in turn: no prefetcher sees that coming */
                for (int block = 0; block < blocks; block++) prefetch(w, k + AHEAD, i, at + block * LANES);
#define CORRELATE_ENTRIES(N)                                              \
    for (; j + N <= pq; j += N) {                                         \
        EACH##N(CLEAR)                                                    \
        for (int block = 0; block < blocks; block++) {                    \
            const vec x = channel_block(w, k, i, at + block * LANES);     \
            EACH##N(CORRELATE)                                            \
        }                                                                 \
        EACH##N(ADD)                                                      \
    }
            CORRELATE_ENTRIES(16)
            CORRELATE_ENTRIES(4)
            CORRELATE_ENTRIES(1)
        }
    }
}

/* The same with a factor for each tile of a row: a lane has its own. */
INLINE vec own(const job *w, int64_t entry, int64_t at) { return *(const vec *)(w->factor + entry * w->wide + at); }

INLINE void encode_wide_block(const job *w, int64_t i, int64_t at, const int p, const int q) {
    vec v[MAX_PQ];
    gather(w, w->first + i, at, v, p, q);
    const int pq = p * q;
    for (int k = 0; k < w->rank; k++) {
        const int64_t entry = (int64_t)k * pq;
        vec s0 = own(w, entry, at) * v[0], s1 = {0};
        int j = 1;
        for (; j + 2 <= pq; j += 2) { s0 += own(w, entry + j, at) * v[j]; s1 += own(w, entry + j + 1, at) * v[j + 1]; }
        if (j < pq) s0 += own(w, entry + j, at) * v[j];
        store_channel(w, k, i, at, s0 + s1);
    }
}

INLINE void decode_wide_block(const job *w, int64_t i, int64_t at, const int p, const int q) {
    vec v[MAX_PQ];
    const int pq = p * q;
    for (int j = 0; j < pq; j++) {
        vec s = {0};
        for (int k = 0; k < w->rank; k++) s += own(w, (int64_t)k * pq + j, at) * channel_block(w, k, i, at);
        v[j] = s;
    }
    scatter(w, w->first + i, at, v, p, q);
}

INLINE void correlate_wide_row(const job *w, int64_t i, float *sums, const int p, const int q) {
    vec v[MAX_PQ];
    const int pq = p * q;
    for (int64_t at = 0; at < w->tiles; at += LANES) {
        gather(w, w->first + i, at, v, p, q);
        for (int k = 0; k < w->rank; k++) {
            const vec x = channel_block(w, k, i, at);
            for (int j = 0; j < pq; j++) *(vec *)(sums + ((int64_t)k * pq + j) * w->wide + at) += x * v[j];
        }
    }
}

typedef void (*rows_fn)(const job *, int64_t, int64_t, float *);

#define ROWS(NAME, KIND, P, Q)                                                                        \
    CLONES static void encode_##NAME(const job *w, int64_t from, int64_t to, float *unused) {          \
        (void)unused;                                                                                 \
        for (int64_t i = from; i < to; i++)                                                           \
            for (int64_t at = 0; at < w->tiles; at += LANES) encode##KIND##_block(w, i, at, P, Q);    \
    }                                                                                                 \
    CLONES static void decode_##NAME(const job *w, int64_t from, int64_t to, float *unused) {          \
        (void)unused;                                                                                 \
        for (int64_t i = from; i < to; i++)                                                           \
            for (int64_t at = 0; at < w->tiles; at += LANES) decode##KIND##_block(w, i, at, P, Q);    \
    }                                                                                                 \
    CLONES static void correlate_##NAME(const job *w, int64_t from, int64_t to, float *sums) {         \
        for (int64_t i = from; i < to; i++) correlate##KIND##_row(w, i, sums, P, Q);                  \
    }

ROWS(4x4, , 4, 4)
ROWS(2x2, , 2, 2)
ROWS(1x4, , 1, 4)
ROWS(2x4, , 2, 4)
ROWS(q1, , w->p, 1)
ROWS(q2, , w->p, 2)
ROWS(q4, , w->p, 4)
ROWS(q8, , w->p, 8)
ROWS(wide_q1, _wide, w->p, 1)
ROWS(wide_q2, _wide, w->p, 2)
ROWS(wide_q4, _wide, w->p, 4)
ROWS(wide_q8, _wide, w->p, 8)

#define PICK(STEP) \
    (w->wide ? (w->q == 1 ? STEP##_wide_q1 : w->q == 2 ? STEP##_wide_q2 : w->q == 4 ? STEP##_wide_q4 : STEP##_wide_q8) \
     : w->p == 4 && w->q == 4 ? STEP##_4x4 : w->p == 2 && w->q == 2 ? STEP##_2x2 \
     : w->p == 1 && w->q == 4 ? STEP##_1x4 : w->p == 2 && w->q == 4 ? STEP##_2x4 \
     : w->q == 1 ? STEP##_q1 : w->q == 2 ? STEP##_q2 : w->q == 4 ? STEP##_q4 : STEP##_q8)

static void run(const job *w, rows_fn rows, int threads) {
    const int64_t sums = (int64_t)w->rank * w->p * w->q * (w->wide ? w->wide : LANES);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        rows(w, w->count * t / threads, w->count * (t + 1) / threads, w->factor + t * sums);
}

/* step, matrix, encoded, factor, bias, rows, columns, sample_stride, row_stride, tile_rows, tiles, channel, first,
 * count, wide, rank, p, q, type, threads: addresses and sizes as integers; the caller has checked them. */
static PyObject *call(PyObject *self, PyObject *args) {
    (void)self;
    const char *step;
    unsigned long long matrix, encoded, factor, bias;
    long long n[10];
    job w;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKKLLLLLLLLLLiiiii", &step, &matrix, &encoded, &factor, &bias, &n[0], &n[1],
                          &n[2], &n[3], &n[4], &n[5], &n[6], &n[7], &n[8], &n[9], &w.rank, &w.p, &w.q, &w.type, &threads))
        return NULL;
    w.matrix = (char *)(uintptr_t)matrix;
    w.encoded = (char *)(uintptr_t)encoded;
    w.factor = (float *)(uintptr_t)factor;
    w.bias = (const float *)(uintptr_t)bias;
    w.rows = n[0]; w.columns = n[1]; w.sample_stride = n[2]; w.row_stride = n[3]; w.tile_rows = n[4]; w.tiles = n[5];
    w.channel = n[6]; w.first = n[7]; w.count = n[8]; w.wide = n[9];
    const job *at = &w;
    rows_fn rows;
    {
        const job *w = at;
        rows = step[0] == 'e' ? PICK(encode) : step[0] == 'd' ? PICK(decode) : PICK(correlate);
    }
    Py_BEGIN_ALLOW_THREADS;
    run(at, rows, threads);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* advise(address, bytes): ask for huge pages behind fresh memory, before it is touched. Faulting in 100 MB by 4 KB pages
 * costs more than encoding it. */
static PyObject *advise(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) return NULL;
#ifdef MADV_HUGEPAGE
    const unsigned long long page = 1ull << 21, from = (address + page - 1) & ~(page - 1), to = (address + bytes) & ~(page - 1);
    if (to > from) madvise((void *)(uintptr_t)from, to - from, MADV_HUGEPAGE); /* advice: failing changes nothing */
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"call", call, METH_VARARGS, "Run one kernel; see tiles.py."},
    {"advise", advise, METH_VARARGS, "Ask for huge pages behind fresh memory."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
