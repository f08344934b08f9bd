/* A short convolution over the rows of a matrix, depthwise: each feature has taps of its own.
 *
 *   convolve   Y[n][k] = (X[n][k]) + Σ_t W[t][k]·X[n + t − before][k]
 *   correlate  S[t][k] += Σ_n G[n][k]·X[n + t − before][k], a part for each thread
 * Rows outside the sample count as zeros. One pass over memory: the rows that a row sees are in the first cache.
 *
 * Threads are OpenMP's: see the head of _kernels.c.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include "vectors.h"

typedef struct {
    const char *x, *g; /* (batch, rows, columns), dense */
    char *y;
    const float *weight; /* (taps, columns) */
    float *sums;         /* (threads, taps, columns) */
    int64_t rows, columns, count; /* count: rows of all samples */
    int taps, before, residual, type;
} job;

/* Row i of all; what it sees of its sample: taps `first` to `last`, from row `from` on. */
#define SEEN                                                                        \
    const int64_t n = i % w->rows, K = w->columns, own = i * K;                      \
    const int first = n < w->before ? (int)(w->before - n) : 0;                      \
    const int64_t there = w->rows - n + w->before;                                   \
    const int last = there < w->taps ? (int)there : w->taps;                         \
    const int64_t from = (i + first - w->before) * K;

CLONES static void convolve(const job *w, int64_t begin, int64_t end, float *unused) {
    (void)unused;
    for (int64_t i = begin; i < end; i++) {
        SEEN
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            vec sum = w->residual ? load(w->x, own + k, w->type) : (vec){0};
            const float *weight = w->weight + first * K + k;
            for (int t = first; t < last; t++, weight += K)
                sum += *(const vec *)weight * load(w->x, from + (t - first) * K + k, w->type);
            store(w->y, own + k, w->type, sum);
        }
        if (k == K) continue;
        vec sum = w->residual ? load_part(w->x, own + k, w->type, K - k) : (vec){0};
        for (int t = first; t < last; t++)
            sum += load_part((const char *)w->weight, t * K + k, FLOAT32, K - k) *
                   load_part(w->x, from + (t - first) * K + k, w->type, K - k);
        store_part(w->y, own + k, w->type, sum, K - k);
    }
}

CLONES static void correlate(const job *w, int64_t begin, int64_t end, float *sums) {
    for (int64_t i = begin; i < end; i++) {
        SEEN
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            const vec g = load(w->g, own + k, w->type);
            float *to = sums + first * K + k;
            for (int t = first; t < last; t++, to += K)
                *(vec *)to += g * load(w->x, from + (t - first) * K + k, w->type);
        }
        if (k == K) continue;
        const vec g = load_part(w->g, own + k, w->type, K - k);
        for (int t = first; t < last; t++) {
            char *to = (char *)(sums + t * K);
            const vec sum = load_part(to, k, FLOAT32, K - k) + g * load_part(w->x, from + (t - first) * K + k, w->type, K - k);
            store_part(to, k, FLOAT32, sum, K - k);
        }
    }
}

/* step, x, g or weight, y or sums, rows, columns, count, taps, before, residual, type, threads: addresses and sizes as
 * integers; the caller has checked them. */
static PyObject *call(PyObject *self, PyObject *args) {
    (void)self;
    const char *step;
    unsigned long long x, second, to;
    long long n[3];
    int threads;
    job w;
    if (!PyArg_ParseTuple(args, "sKKKLLLiiiii", &step, &x, &second, &to, &n[0], &n[1], &n[2], &w.taps, &w.before, &w.residual,
                          &w.type, &threads))
        return NULL;
    const int correlates = step[2] == 'r';
    w.x = (const char *)(uintptr_t)x;
    w.g = (const char *)(uintptr_t)second;
    w.weight = (const float *)(uintptr_t)second;
    w.y = (char *)(uintptr_t)to;
    w.sums = (float *)(uintptr_t)to;
    w.rows = n[0]; w.columns = n[1]; w.count = n[2];
    Py_BEGIN_ALLOW_THREADS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        const int64_t begin = w.count * t / threads, end = w.count * (t + 1) / threads;
        if (correlates) correlate(&w, begin, end, w.sums + (int64_t)t * w.taps * w.columns);
        else convolve(&w, begin, end, NULL);
    }
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"call", call, METH_VARARGS, "Run one kernel; see taps.py."}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_taps", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__taps(void) { return PyModule_Create(&module); }
