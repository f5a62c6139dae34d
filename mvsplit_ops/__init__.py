"""Fused operators of ultra-deep Diffusion Transformers.

    import mvsplit_ops as mv
    y = mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=(256, 64))
    q, k = mv.rope_qk_norm(q, k, cos, sin)
    h = mv.swiglu(x)

Every operator is differentiable, takes `backend=`, and is also torch.ops.mvsplit.<op>. What runs
where: `python -m mvsplit_ops`, or mv.backends().
"""

from mvsplit_ops import reference
from mvsplit_ops._backends import backends, get_backend, use_backend
from mvsplit_ops._register import recompute_cheap_ops
from mvsplit_ops._version import __version__ as __version__
from mvsplit_ops.modules import MVSplitRMSNorm
from mvsplit_ops.mvsplit_rmsnorm import mvsplit_rmsnorm, mvsplit_rmsnorm_with_mean
from mvsplit_ops.qk_norm import qk_norm
from mvsplit_ops.residual_rmsnorm import residual_rmsnorm
from mvsplit_ops.rope import rope
from mvsplit_ops.rope_qk_norm import rope_qk_norm
from mvsplit_ops.swiglu import swiglu

__all__ = [
    "MVSplitRMSNorm",
    "backends",
    "get_backend",
    "mvsplit_rmsnorm",
    "mvsplit_rmsnorm_with_mean",
    "qk_norm",
    "recompute_cheap_ops",
    "reference",
    "residual_rmsnorm",
    "rope",
    "rope_qk_norm",
    "swiglu",
    "use_backend",
]
