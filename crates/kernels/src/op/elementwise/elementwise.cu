// Operations on each element alone.

#include "cuda/prelude.cuh"

// y = x
KERNEL cast(Floats x, FloatsMut y, u64 count) {
    each(count, [&](u64 i, bool four) {
        if (!four) return store(y, i, load(x, i));
        float v[4];
        load4(x, i, v);
        store4(y, i, v);
    });
}
