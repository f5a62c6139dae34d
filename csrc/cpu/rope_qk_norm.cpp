// RoPE and QK-Norm of q and k in one pass. Counting q and k as one tensor each: 2 read and 2 written
// forward, 4 and 2 backward; the two operators in sequence take 4 and 4, and 6 and 4.
// Math, bytes and launch: heads.h.
#include "heads.h"

MVSPLIT_KERNELS_BEGIN

void rope_qk_norm_fwd(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        a.norm_first ? forward<T, Op::rope_qk_norm, true>(a)
                     : forward<T, Op::rope_qk_norm, false>(a);
    });
}

void rope_qk_norm_bwd(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) {
        using T = decltype(t);
        a.norm_first ? backward<T, Op::rope_qk_norm, true>(a)
                     : backward<T, Op::rope_qk_norm, false>(a);
    });
}

MVSPLIT_KERNELS_END
