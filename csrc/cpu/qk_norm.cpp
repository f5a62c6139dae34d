// RMSNorm over Dh of each head of q and k, in one launch. Math, bytes and launch: heads.h.
#include "heads.h"

MVSPLIT_KERNELS_BEGIN

void qk_norm_fwd(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) { forward<decltype(t), Op::qk_norm, false>(a); });
}

void qk_norm_bwd(const HeadArgs& a, c10::ScalarType dtype) {
    dispatch(dtype, [&](auto t) { backward<decltype(t), Op::qk_norm, false>(a); });
}

MVSPLIT_KERNELS_END
