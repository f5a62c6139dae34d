"""Every implementation that an operator can be measured in, as tables of data.

    eager, compile     mvsplit_ops.reference, as it is and under torch.compile
    cpu, triton, cuda  the operator's backends
    liger, quack       the PyPI packages liger-kernel and quack-kernels
    published          a checkout of erwold/mv-split, the kernels of arXiv 2605.06169

All take and give tensors in this project's layout. A peer that wants another one is given views;
what copies that costs it is part of its call. A peer is imported when it is asked for.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from mvsplit_ops import _backends, reference

IMPLEMENTATIONS = ("eager", "compile", "cpu", "triton", "cuda", "liger", "quack", "published")

# {peer: (package, the version whose interface is used here)}
PACKAGES = {"liger": ("liger-kernel", "0.8.5"), "quack": ("quack-kernels", "0.6.5")}

# What a checkout of the published kernels holds in its folder kernels, read at 2ab9ddf.
PUBLISHED = ("_common.py", "rope.py", "rmsnorm.py", "swiglu.py", "fused_mvsplit_rmsnorm.py")

# The epsilons of the definitions: the peers have defaults of their own.
HEAD_EPS, MERGE_EPS = (
    inspect.signature(definition).parameters["eps"].default
    for definition in (reference.qk_norm, reference.mvsplit_rmsnorm)
)

TWO_SEGMENTS = "its MV-Split takes one or two segments, not {}"

NEED_CUDA = ("triton", "cuda", "liger", "quack", "published")


def function(name, case, device, published=None):
    """The implementation as Case.function: (activations, constants, kwargs) -> tuple of results.

    published  the folder of a checkout of erwold/mv-split
    On CPU tensors Triton kernels are interpreted; what cannot be timed there, `missing` tells.
    ValueError: no such implementation. RuntimeError: it has no such operator, or is not installed.
    """
    _known(name)
    if name == "eager":
        return case.reference
    if name == "compile":
        return torch.compile(case.reference, fullgraph=True)
    if name in _backends.BACKENDS:
        return case.fused(name)
    if why := lacks(name, case) or _not_installed(name, case, published):
        raise RuntimeError(f"{case.op}: '{name}' cannot run on {device}: {why}")
    op = PEERS[name][case.op](published)

    def call(activations, constants, kwargs):
        return op(*activations, *constants, **kwargs)

    return call


def missing(name, case, device, published=None, segments=None):
    """Why an implementation cannot be timed on a device, in one line; None when it can."""
    _known(name)
    device_type = torch.device(device).type
    if why := lacks(name, case, segments):
        return why
    if name in NEED_CUDA and device_type != "cuda":
        return f"it needs a CUDA device: on {device_type} there is nothing of it to time"
    if name in _backends.BACKENDS:  # what carries the mean is a call of the same kernels
        return _backends.missing(name, case.op.removesuffix("_with_mean"), device_type)
    return _not_installed(name, case, published) if name in PEERS else None


def lacks(name, case, segments=None):
    """What an implementation does not offer of an operator, on any machine; None: it has it.

    segments  token counts, where they are known
    """
    if name not in PEERS:
        return None
    if case.op not in PEERS[name]:
        return LACKS.get((name, case.op), f"it has no {case.title}")
    if (name, case.op) == ("published", "mvsplit_rmsnorm") and len(segments or ()) > 2:
        return TWO_SEGMENTS.format(len(segments))
    return None


def _not_installed(name, case, published):
    if name == "published":
        return no_checkout(published) or _not_importable(name, case, published, "triton")
    package, read = PACKAGES[name]
    wanted = f"{package}>={read}"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed; run pip install '{wanted}'"
    if _numbers(found) < _numbers(read):
        return f"{package} {found} is older than {read}; run pip install '{wanted}'"
    return _not_importable(name, case, published, f"'{wanted}'")


def _not_importable(name, case, published, requirement):
    try:
        PEERS[name][case.op](published)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # or what it imports
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"it cannot be imported ({reason}); run pip install {requirement}"
    return None


def no_checkout(folder):
    """Why a folder does not hold the published kernels, in one line; None when it does."""
    if folder is None:
        return "no checkout of erwold/mv-split was given; pass its folder with --published"
    absent = [file for file in PUBLISHED if not (Path(folder) / "kernels" / file).is_file()]
    if absent:
        return f"{folder} is no checkout of erwold/mv-split: expected kernels/{absent[0]} in it"
    return None


def _numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)[:3]]


def _known(name):
    if name not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be one of {names}, got {name!r}")


def _by_heads(t):
    """(B, T, H, Dh) as (B, H, T, Dh), and back: a view."""
    return t.transpose(1, 2)


# Below, a peer's operator is a function that imports it: folder of the published checkout -> op.


def _liger_rope(_):
    from liger_kernel.ops import LigerRopeFunction

    def rope(q, k, cos, sin):
        # It turns q and k where they lie, unknown to autograd: who needs them again copies them.
        # Its backward does so to the gradients, which here are not needed again.
        q, k = (_by_heads(t.clone()) for t in (q, k))
        width = q.shape[-1]  # told, since tables of half that width are not its default
        return tuple(map(_by_heads, LigerRopeFunction.apply(q, k, cos, sin, None, 1, width)))

    return rope


def _liger_qk_norm(_):
    from liger_kernel.ops import LigerRMSNormFunction

    def qk_norm(q, k, eps=HEAD_EPS):
        # Its default: dx is written over dy.
        return tuple(LigerRMSNormFunction.apply(t, None, eps) for t in (q, k))

    return qk_norm


def _liger_swiglu(_):
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    def swiglu(x):  # rows: the gradient comes as (rows, 2 F), whatever shape x had
        y = LigerFusedGateUpSiLUMulFunction.apply(x.flatten(0, 1))
        return (y.unflatten(0, x.shape[:2]),)

    return swiglu


def _quack_rope(_):
    from quack.rotary import apply_rotary_emb

    def rope(q, k, cos, sin):
        return tuple(apply_rotary_emb(t, cos, sin) for t in (q, k))

    return rope


def _quack_qk_norm(_):
    from quack import rmsnorm

    def qk_norm(q, k, eps=HEAD_EPS):
        return tuple(rmsnorm(t, eps=eps) for t in (q, k))

    return qk_norm


def _rope_then_norm(rope, qk_norm):
    """rope_qk_norm of a library that has the two apart."""

    def make(folder):
        first, then = rope(folder), qk_norm(folder)

        def rope_qk_norm(q, k, cos, sin, **kwargs):
            return then(*first(q, k, cos, sin), **kwargs)

        return rope_qk_norm

    return make


def _published_rope(folder):
    fast_rope_embedding = _published(folder, "rope").fast_rope_embedding

    def rope(q, k, cos, sin):
        q, k = fast_rope_embedding(_by_heads(q), _by_heads(k), cos, _negated(sin))
        return _by_heads(q), _by_heads(k)

    return rope


def _published_qk_norm(folder):
    fused_qk_norm = _published(folder, "rmsnorm").fused_qk_norm

    def qk_norm(q, k, eps=HEAD_EPS):
        return fused_qk_norm(q, k, eps)

    return qk_norm


def _published_rope_qk_norm(folder):
    rope, qk_norm = _published_rope(folder), _published_qk_norm(folder)

    def rope_qk_norm(q, k, cos, sin, **kwargs):
        # The norm's kernels want what RoPE gives, contiguous (B, H, T, Dh). Its backward copies a
        # gradient that is not.
        q, k = qk_norm(*map(_by_heads, rope(q, k, cos, sin)), **kwargs)
        return _by_heads(q), _by_heads(k)

    return rope_qk_norm


def _published_swiglu(folder):
    fast_swiglu_packed = _published(folder, "swiglu").fast_swiglu_packed
    return lambda x: (fast_swiglu_packed(x),)


def _published_mvsplit_rmsnorm(folder):
    fused = _published(folder, "fused_mvsplit_rmsnorm").fused_mvsplit_rmsnorm

    def mvsplit_rmsnorm(x, f, alpha, beta, segments=None, eps=MERGE_EPS):
        segments = segments or [x.shape[1]]
        if len(segments) > 2:
            raise ValueError(f"published: {TWO_SEGMENTS.format(len(segments))}")
        return (fused(x, f, alpha, beta, eps, segments[0]),)

    return mvsplit_rmsnorm


PEERS = {
    "liger": {
        "rope": _liger_rope,
        "qk_norm": _liger_qk_norm,
        "rope_qk_norm": _rope_then_norm(_liger_rope, _liger_qk_norm),
        "swiglu": _liger_swiglu,
    },
    "quack": {
        "rope": _quack_rope,
        "qk_norm": _quack_qk_norm,
        "rope_qk_norm": _rope_then_norm(_quack_rope, _quack_qk_norm),
    },
    "published": {
        "rope": _published_rope,
        "qk_norm": _published_qk_norm,
        "rope_qk_norm": _published_rope_qk_norm,
        "swiglu": _published_swiglu,
        "mvsplit_rmsnorm": _published_mvsplit_rmsnorm,
    },
}

# Why, where it is not that a library has nothing of the kind.
LACKS = {
    ("liger", "residual_rmsnorm"): "its RMSNorm of a sum takes no scale",
    ("quack", "residual_rmsnorm"): "its RMSNorm of a sum takes no scale",
    ("quack", "swiglu"): "it has SwiGLU as the epilogue of a matrix product alone",
}

_NEGATED = WeakTensorKeyDictionary()


def _negated(sin):
    """-sin: a rotation by -theta is the published one. Made once of a table, and never counted."""
    if sin not in _NEGATED:
        with _disable_current_modes():
            _NEGATED[sin] = -sin
    return _NEGATED[sin]


@functools.cache
def _published(checkout, name):
    """The module kernels/<name>.py of a checkout, in no one's way."""
    folder = Path(checkout).resolve() / "kernels"
    spec = importlib.util.spec_from_file_location(f"bench.published.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with _as_kernels(folder):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _as_kernels(folder):
    """Within the block `import kernels.x` finds x.py of a folder, afterwards what it did before.

    PyPI has a package of that name.
    """
    before = _take_kernels()
    package = types.ModuleType("kernels")
    package.__path__ = [str(folder)]
    sys.modules["kernels"] = package
    try:
        yield
    finally:
        _take_kernels()
        sys.modules.update(before)


def _take_kernels():
    names = [name for name in sys.modules if name.split(".")[0] == "kernels"]
    return {name: sys.modules.pop(name) for name in names}


def add_published(command):
    command.add_argument(
        "--published",
        type=Path,
        metavar="PATH",
        help="a checkout of the paper's kernels (github.com/erwold/mv-split) beside ours",
    )


def published_checkout(args):
    """The checkout of --published, or None; ValueError where the folder is none."""
    if args.published and (why := no_checkout(args.published)):
        raise ValueError(f"--published: {why}")
    return args.published
