/* Sixteen numbers at a time, of float32 or bfloat16 in memory and float32 in registers.
 *
 * GCC/Clang vector extensions; on x86-64 what is marked CLONES is compiled for several instruction sets and chosen at load.
 * Arithmetic is float32 whatever the storage (rounded to nearest even).
 */
#ifndef STRASSEN_TILE_VECTORS_H
#define STRASSEN_TILE_VECTORS_H
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2)));

enum { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE vec widen(hvec h) {
    uvec u = __builtin_convertvector(h, uvec) << 16;
    return (vec)u;
}

INLINE hvec narrow(vec v) {
    uvec u = (uvec)v;
    uvec nan = (uvec)(v != v);
    u += 0x7fff + ((u >> 16) & 1);
    u = (u & ~nan) | (nan & 0x7fc00000);
    return __builtin_convertvector(u >> 16, hvec);
}

INLINE vec load(const char *p, int64_t at, int type) {
    if (type == BFLOAT16) return widen(*(const hvec *)((const uint16_t *)p + at));
    return *(const vec *)((const float *)p + at);
}

INLINE void store(char *p, int64_t at, int type, vec v) {
    if (type == BFLOAT16) *(hvec *)((uint16_t *)p + at) = narrow(v);
    else *(vec *)((float *)p + at) = v;
}

/* The first n lanes, n < LANES; the others are zero, and are not written. */
INLINE vec load_part(const char *p, int64_t at, int type, int64_t n) {
    union { float f[LANES]; uint16_t h[LANES]; } buffer;
    memset(&buffer, 0, sizeof buffer);
    if (type == BFLOAT16) { memcpy(buffer.h, (const uint16_t *)p + at, 2 * n); return widen(*(hvec *)buffer.h); }
    memcpy(buffer.f, (const float *)p + at, 4 * n);
    return *(vec *)buffer.f;
}

INLINE void store_part(char *p, int64_t at, int type, vec v, int64_t n) {
    if (type == BFLOAT16) { hvec h = narrow(v); memcpy((uint16_t *)p + at, &h, 2 * n); }
    else memcpy((float *)p + at, &v, 4 * n);
}

#endif
