/* elem_t: the element type of tensors in memory, float32, or bfloat16 with -DBFLOAT16. Arithmetic is float32.
   weight_t: that of matrices, elem_t, or with -DINT8 an integer that the scale of its row multiplies. */

#include <stdint.h>
#include <string.h>

/* Not <omp.h>, which Apple's compiler lacks. */
int omp_get_num_threads(void);
int omp_get_thread_num(void);

#ifdef BFLOAT16
typedef uint16_t elem_t;
static inline float to_float(elem_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline elem_t from_float(float x) { /* round to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#else
typedef float elem_t;
static inline float to_float(elem_t x) { return x; }
static inline elem_t from_float(float x) { return x; }
#endif

#ifdef INT8
typedef int8_t weight_t;
#else
typedef elem_t weight_t;
#endif
