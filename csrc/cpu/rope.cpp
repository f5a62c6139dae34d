// Rotary position embedding of one tensor; the gradient is the same kernel with the rotation
// inverted. Math and bytes: heads.h.
#include "heads.h"

MVSPLIT_KERNELS_BEGIN

void rope(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) { forward<decltype(t), Op::rope, false>(a); });
}

MVSPLIT_KERNELS_END
