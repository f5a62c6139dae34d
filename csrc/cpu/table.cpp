// Table of the kernels, for the instruction set that this file is compiled for.
#include "kernels.h"

namespace mvsplit {
namespace CPU_CAPABILITY {

void rope(const HeadArgs&, c10::ScalarType);
void qk_norm_fwd(const HeadArgs&, c10::ScalarType);
void qk_norm_bwd(const HeadArgs&, c10::ScalarType);
void rope_qk_norm_fwd(const HeadArgs&, c10::ScalarType);
void rope_qk_norm_bwd(const HeadArgs&, c10::ScalarType);
void swiglu_fwd(const SwigluArgs&, c10::ScalarType);
void swiglu_bwd(const SwigluArgs&, c10::ScalarType);
void mvsplit_rmsnorm_fwd(const MergeArgs&, c10::ScalarType);
void mvsplit_rmsnorm_bwd(const MergeArgs&, c10::ScalarType);
void residual_rmsnorm_fwd(const MergeArgs&, c10::ScalarType);
void residual_rmsnorm_bwd(const MergeArgs&, c10::ScalarType);

const Kernels& kernels() {
    static const Kernels table{rope,
                               qk_norm_fwd,
                               qk_norm_bwd,
                               rope_qk_norm_fwd,
                               rope_qk_norm_bwd,
                               swiglu_fwd,
                               swiglu_bwd,
                               mvsplit_rmsnorm_fwd,
                               mvsplit_rmsnorm_bwd,
                               residual_rmsnorm_fwd,
                               residual_rmsnorm_bwd};
    return table;
}

}  // namespace CPU_CAPABILITY
}  // namespace mvsplit
