/* The type of stored numbers, float32 or with -DBFLOAT16 bfloat16. Arithmetic is float32. */

#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t stored;
static inline float widen(stored x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static inline stored narrow(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#else
typedef float stored;
static inline float widen(stored x) { return x; }
static inline stored narrow(float x) { return x; }
#endif
