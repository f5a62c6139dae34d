"""Every implementation of an operator that can be measured, as tables of data.

    eager, compile     mvsplit_ops.reference in plain arithmetic (see bench.cases), as it is and
                       under torch.compile
    cpu, triton, cuda  the operator's backends
    liger, quack       the PyPI packages liger-kernel and quack-kernels
    published          a checkout of erwold/mv-split, the kernels of arXiv 2605.06169

All take and return tensors in this project's layout. A peer that needs another layout is passed
views; the copies that this costs it are part of its call. A peer is imported when it is first used.
"""

import argparse
import builtins
import functools
import importlib.metadata
import importlib.util
import inspect
import re
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from bench.cases import Case, Function, Operator, Results, in_order, is_cuda, plain
from mvsplit_ops import _backends, reference

IMPLEMENTATIONS = ("eager", "compile", "cpu", "triton", "cuda", "liger", "quack", "published")

# {peer: (package, the oldest version with the interface that is used here)}
PACKAGES = {"liger": ("liger-kernel", "0.8.5"), "quack": ("quack-kernels", "0.6.5")}

# Files in the folder kernels of a checkout of the published kernels, as of commit 2ab9ddf.
PUBLISHED = ("_common.py", "rope.py", "rmsnorm.py", "swiglu.py", "fused_mvsplit_rmsnorm.py")

# The epsilons of the definitions: the peers have other defaults.
HEAD_EPS, MERGE_EPS = (
    inspect.signature(definition).parameters["eps"].default
    for definition in (reference.qk_norm, reference.mvsplit_rmsnorm)
)

TWO_SEGMENTS = "its MV-Split takes one or two segments, not {}"

NEED_CUDA = ("triton", "cuda", "liger", "quack", "published")


def load_function(name: str, case: Case, device: str, published: Path | None = None) -> Function:
    """Return an implementation as Case.function: (activations, constants, kwargs) -> results.

    published  the folder of a checkout of erwold/mv-split
    On CPU tensors Triton kernels are interpreted; missing_reason excludes what cannot be timed.
    ValueError: unknown implementation. RuntimeError: it lacks the operator, or is not installed.
    """
    _check_name(name)
    if name == "eager":
        return case.eager
    if name == "compile":
        return plain(torch.compile(case.reference, fullgraph=True))
    if name in _backends.BACKENDS:
        return case.fused(name)
    if reason := lacking_reason(name, case) or _not_installed(name, published):
        raise RuntimeError(f"{case.op}: '{name}' cannot run on {device}: {reason}")
    return replace(case, call=in_order).function(LOADERS[name](published)[case.op])


def is_peer(name: str) -> bool:
    """Return whether an implementation is not ours, so that it may err as plain eager code does."""
    return name not in _backends.BACKENDS


def missing_reason(
    name: str,
    case: Case,
    device: str,
    published: Path | None = None,
    segments: Sequence[int] | None = None,
) -> str | None:
    """Return why an implementation cannot be timed on a device, in one line; None if it can."""
    _check_name(name)
    if reason := lacking_reason(name, case, segments):
        return reason
    device_type = torch.device(device).type
    if name in NEED_CUDA and not is_cuda(device):
        return f"it needs a CUDA device: on {device_type} there is nothing to time"
    if name in _backends.BACKENDS:  # the merge that carries the mean uses the same kernels
        return _backends.find_missing(name, case.op.removesuffix("_with_mean"), device_type)
    return _not_installed(name, published) if name in PEERS else None


def lacking_reason(name: str, case: Case, segments: Sequence[int] | None = None) -> str | None:
    """Return why an implementation lacks an operator on every machine; None if it has it.

    segments  token counts, if they are known
    """
    if name not in PEERS:
        return None
    if case.op not in PEERS[name]:
        return LACKING.get((name, case.op), f"it has no {case.title}")
    if (name, case.op) == ("published", "mvsplit_rmsnorm") and len(segments or ()) > 2:
        return TWO_SEGMENTS.format(len(segments or ()))
    return None


def _not_installed(name: str, published: Path | None) -> str | None:
    if name == "published":
        requirement, reason = "triton", _no_checkout(published)
    else:
        package, oldest = PACKAGES[name]
        requirement, reason = f"'{package}>={oldest}'", _no_package(package, oldest)
    if reason:
        return reason
    try:
        LOADERS[name](published)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # or of its imports
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"it cannot be imported ({reason}); run pip install {requirement}"
    return None


def _no_package(package: str, oldest: str) -> str | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed; run pip install '{package}>={oldest}'"
    if _numbers(version) < _numbers(oldest):
        return f"{package} {version} is older than {oldest}; run pip install '{package}>={oldest}'"
    return None


def _no_checkout(folder: Path | None) -> str | None:
    """Return why a folder does not have the published kernels, in one line; None if it does."""
    if folder is None:
        return "it needs a checkout of erwold/mv-split; pass its folder with --published"
    absent = [file for file in PUBLISHED if not (Path(folder) / "kernels" / file).is_file()]
    if absent:
        return f"{folder} is not a checkout of erwold/mv-split: expected kernels/{absent[0]} in it"
    return None


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:3]]


def _check_name(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be one of {names}, got {name!r}")


def _by_heads(t: Tensor) -> Tensor:
    """Return (B, T, H, Dh) as (B, H, T, Dh), or the reverse: a view."""
    return t.transpose(1, 2)


def _load_liger(_: Path | None) -> dict[str, Operator]:
    from liger_kernel.ops import (
        LigerFusedGateUpSiLUMulFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
    )

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        # It rotates q and k in place, unknown to autograd: a caller that needs them again copies
        # them. Its backward does so to the gradients, which are not needed again here.
        q, k = (_by_heads(t.clone()) for t in (q, k))
        width = q.shape[-1]  # its default expects tables twice as wide
        return tuple(map(_by_heads, LigerRopeFunction.apply(q, k, cos, sin, None, 1, width)))

    def qk_norm(q: Tensor, k: Tensor) -> Results:  # its dx overwrites dy
        return tuple(LigerRMSNormFunction.apply(t, None, HEAD_EPS) for t in (q, k))

    def swiglu(x: Tensor) -> Tensor:  # flat: the gradient is (rows, 2 F) for x of any shape
        return LigerFusedGateUpSiLUMulFunction.apply(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    return {**_rope_and_norm(rope, qk_norm), "swiglu": swiglu}


def _load_quack(_: Path | None) -> dict[str, Operator]:
    from quack import rmsnorm
    from quack.rotary import apply_rotary_emb

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        return tuple(apply_rotary_emb(t, cos, sin) for t in (q, k))

    def qk_norm(q: Tensor, k: Tensor) -> Results:
        return tuple(rmsnorm(t, eps=HEAD_EPS) for t in (q, k))

    return _rope_and_norm(rope, qk_norm)


def _rope_and_norm(rope: Operator, qk_norm: Operator) -> dict[str, Operator]:
    """Return both operators of a library, and rope_qk_norm as a call of each."""

    def rope_qk_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        return qk_norm(*rope(q, k, cos, sin))

    return {"rope": rope, "qk_norm": qk_norm, "rope_qk_norm": rope_qk_norm}


def _load_published(folder: Path | None) -> dict[str, Operator]:
    rotate = _published_module(folder, "rope").fast_rope_embedding
    norm = _published_module(folder, "rmsnorm").fused_qk_norm
    swiglu = _published_module(folder, "swiglu").fast_swiglu_packed
    merge = _published_module(folder, "fused_mvsplit_rmsnorm").fused_mvsplit_rmsnorm

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        return tuple(map(_by_heads, rotate(_by_heads(q), _by_heads(k), cos, _negated(sin))))

    def qk_norm(q: Tensor, k: Tensor) -> Results:
        return norm(q, k, HEAD_EPS)

    def rope_qk_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        # The norm's kernels need the layout of RoPE's results, contiguous (B, H, T, Dh). Its
        # backward copies a gradient that is not.
        return tuple(map(_by_heads, qk_norm(*map(_by_heads, rope(q, k, cos, sin)))))

    def mvsplit_rmsnorm(*tensors: Tensor, segments: Sequence[int]) -> Tensor:
        if len(segments) > 2:
            raise ValueError(f"published: {TWO_SEGMENTS.format(len(segments))}")
        return merge(*tensors, MERGE_EPS, segments[0])

    operators = (rope, qk_norm, rope_qk_norm, swiglu, mvsplit_rmsnorm)
    return dict(zip(PEERS["published"], operators, strict=True))


LOADERS = {"liger": _load_liger, "quack": _load_quack, "published": _load_published}
PEERS = {
    "liger": ("rope", "qk_norm", "rope_qk_norm", "swiglu"),
    "quack": ("rope", "qk_norm", "rope_qk_norm"),
    "published": ("rope", "qk_norm", "rope_qk_norm", "swiglu", "mvsplit_rmsnorm"),
}

# Reasons, where a library has an operator of the kind that cannot be used.
LACKING = {
    ("liger", "residual_rmsnorm"): "its RMSNorm of a sum takes no scale",
    ("quack", "residual_rmsnorm"): "its RMSNorm of a sum takes no scale",
    ("quack", "swiglu"): "it has SwiGLU only as the epilogue of a matrix product",
}

_NEGATED = WeakTensorKeyDictionary()


def _negated(sin: Tensor) -> Tensor:
    """Return -sin, made once per table and not counted: the published kernels rotate by -theta."""
    if sin not in _NEGATED:
        with _disable_current_modes():
            _NEGATED[sin] = -sin
    return _NEGATED[sin]


@functools.cache
def _published_module(checkout: Path | str, name: str) -> types.ModuleType:
    """Return the module kernels/<name>.py of a checkout, loaded without a place in sys.modules.

    Its `from kernels.x import y` is resolved within the checkout: PyPI has a package `kernels`.
    """
    path = Path(checkout).resolve() / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench.published.{name}", path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)

    def import_within(target: str, *args: Any) -> types.ModuleType:
        package, _, submodule = target.partition(".")
        if package == "kernels":
            return _published_module(checkout, submodule)
        return builtins.__import__(target, *args)

    vars(module)["__builtins__"] = {**vars(builtins), "__import__": import_within}
    spec.loader.exec_module(module)
    return module


def add_published(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--published",
        type=Path,
        metavar="PATH",
        help="measure the paper's kernels too: a checkout of github.com/erwold/mv-split",
    )


def chosen_checkout(args: argparse.Namespace) -> Path | None:
    """Return the checkout of --published, or None; ValueError if the folder is not one."""
    if args.published and (reason := _no_checkout(args.published)):
        raise ValueError(f"--published: {reason}")
    return args.published
