// Rotary position embedding of one tensor; its gradient is the same kernel with the opposite
// `conjugate`. Math, bytes and launch: heads.h.
#include "heads.h"

MVSPLIT_KERNELS_BEGIN

void rope(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) { forward<decltype(t), Op::rope, false>(a); });
}

MVSPLIT_KERNELS_END
