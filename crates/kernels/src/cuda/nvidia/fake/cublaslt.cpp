// cuBLASLt on host memory, for tests of the bindings: what `cublasLt.h` says of column-major products, and no faster.
//
// It refuses sizes of attributes other than the header's, and has no way to compute a product with 13 rows.

#include <stdint.h>
#include <string.h>

#include <vector>

enum { INVALID_VALUE = 7, NOT_SUPPORTED = 15, R_32F = 0, R_16BF = 14 };

struct Description {
    int compute, scale;
    int32_t transposed_a, transposed_b;
    uint32_t epilogue;
    void *bias;
    int32_t bias_type;
};
struct Layout {
    int dtype;
    uint64_t rows, columns;
    int64_t stride;
};
struct Preference {
    uint64_t workspace;
    uint32_t reductions, alignment[4];
};
struct Found {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

static int asked;

static float read(const void *at, int dtype, size_t index) {
    if (dtype == R_32F) return ((const float *)at)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[index] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void write(void *at, int dtype, size_t index, float value) {
    if (dtype == R_32F) {
        ((float *)at)[index] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)at)[index] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// What an algorithm was found for; another product must not be computed by it.
static uint64_t sum(const Description *of, const Layout *a, const Layout *b, const Layout *c) {
    uint64_t all = of->transposed_a + 2 * of->transposed_b + 4 * of->epilogue;
    for (const Layout *side : {a, b, c}) all = all * 1000003 + side->rows * 7919 + side->columns * 31 + side->stride + side->dtype;
    return all;
}

extern "C" {

int fake_asked() { return asked; }

size_t cublasLtGetVersion() { return 120405; }
const char *cublasLtGetStatusName(int status) { return status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : 0; }
int cublasLtCreate(void **library) {
    *library = &asked;
#ifdef REFUSES
    return 1;
#endif
    return 0;
}
int cublasLtDestroy(void *) { return 0; }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    *description = new Description{compute, scale, 0, 0, 1, 0, -1};
    return compute == 68 && scale == R_32F ? 0 : INVALID_VALUE;
}
int cublasLtMatmulDescDestroy(void *description) {
    delete (Description *)description;
    return 0;
}
int cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value, size_t bytes) {
    Description *of = (Description *)description;
    void *place = attribute == 3   ? (void *)&of->transposed_a
                  : attribute == 4 ? (void *)&of->transposed_b
                  : attribute == 7 ? (void *)&of->epilogue
                  : attribute == 8 ? (void *)&of->bias
                  : attribute == 26 ? (void *)&of->bias_type
                                    : 0;
    if (!place || bytes != (attribute == 8 ? 8 : 4)) return INVALID_VALUE;
    memcpy(place, value, bytes);
    return 0;
}
int cublasLtMatrixLayoutCreate(void **layout, int dtype, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{dtype, rows, columns, stride};
    return stride >= (int64_t)rows ? 0 : INVALID_VALUE;
}
int cublasLtMatrixLayoutDestroy(void *layout) {
    delete (Layout *)layout;
    return 0;
}
int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new Preference{0, 7, {256, 256, 256, 256}};
    return 0;
}
int cublasLtMatmulPreferenceDestroy(void *preference) {
    delete (Preference *)preference;
    return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes) {
    Preference *of = (Preference *)preference;
    void *place = attribute == 1                     ? (void *)&of->workspace
                  : attribute == 3                   ? (void *)&of->reductions
                  : attribute >= 5 && attribute <= 8 ? (void *)&of->alignment[attribute - 5]
                                                     : 0;
    if (!place || bytes != (attribute == 1 ? 8 : 4)) return INVALID_VALUE;
    memcpy(place, value, bytes);
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *, void *description, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   Found *found, int *count) {
    asked++;
    Preference *of = (Preference *)preference;
    if (wanted != 1 || c != d || of->workspace != 32 << 20 || of->reductions != 2) return INVALID_VALUE;
    if (((Layout *)c)->columns == 13) return NOT_SUPPORTED;
    found->algorithm[7] = sum((Description *)description, (Layout *)a, (Layout *)b, (Layout *)c);
    found->algorithm[0] = of->alignment[0] | (uint64_t)of->alignment[1] << 16 | (uint64_t)of->alignment[3] << 32;
    found->status = 0;
    *count = 1;
    return 0;
}
int cublasLtMatmul(void *library, void *description, const float *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const float *beta, const void *c, void *c_layout, void *d, void *d_layout, const uint64_t *algorithm, void *workspace,
                   size_t workspace_bytes, void *stream) {
    Description *of = (Description *)description;
    Layout *la = (Layout *)a_layout, *lb = (Layout *)b_layout, *lc = (Layout *)c_layout;
    uint64_t m = of->transposed_a ? la->columns : la->rows, k = of->transposed_a ? la->rows : la->columns;
    uint64_t n = of->transposed_b ? lb->rows : lb->columns, k_b = of->transposed_b ? lb->columns : lb->rows;
    bool fits = m == lc->rows && n == lc->columns && k == k_b && la->dtype == lb->dtype && c == d && c_layout == d_layout;
    bool known = library == &asked && workspace && workspace_bytes == 32 << 20 && stream && algorithm[7] == sum(of, la, lb, lc);
    bool aligned = (uint64_t)a % (algorithm[0] & 0xffff) == 0 && (uint64_t)b % (algorithm[0] >> 16 & 0xffff) == 0 &&
                   (uint64_t)d % (algorithm[0] >> 32) == 0;
    bool bias = of->epilogue == 4;
    if (known) (*(void (**)())stream)(); // what was asked for before is done first
    if (!fits || !known || !aligned || (bias && of->bias_type != lc->dtype)) return INVALID_VALUE;
    for (uint64_t j = 0; j < n; j++) {
        for (uint64_t i = 0; i < m; i++) {
            float total = 0;
            for (uint64_t l = 0; l < k; l++) {
                float x = read(a, la->dtype, of->transposed_a ? l + i * la->stride : i + l * la->stride);
                float y = read(b, lb->dtype, of->transposed_b ? j + l * lb->stride : l + j * lb->stride);
                total += x * y;
            }
            uint64_t at = i + j * lc->stride;
            float value = *alpha * total + (*beta == 0 ? 0 : *beta * read(c, lc->dtype, at));
            write(d, lc->dtype, at, value + (bias ? read(of->bias, lc->dtype, i) : 0));
        }
    }
    return 0;
}
}
