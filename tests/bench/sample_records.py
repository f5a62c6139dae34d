"""Records of every kind, as the commands write them, from two machines that do not exist."""

import itertools
from dataclasses import asdict

from bench.cases import CASES, PROFILE, Shape, calls_per_step
from model.config import preset

CPU = {"device": "A CPU", "threads": 2, "instruction_set": "AVX2"}
GPU = {
    "device": "A GPU <80 GB>",
    "threads": 8,
    "instruction_set": None,
    "capability": [9, 0],
    "driver": "570.1",
    "clocks": {"sm": "1980", "memory": "2619", "sm_max": "1980"},
}
NO_DEVICE = {}  # nothing was timed
minutes = itertools.count()


def run(device=CPU, batch=4, **changes):
    """Return a run that is newer than all before it."""
    minute = next(minutes)
    return {
        "date": f"2026-01-{2 + minute // 1440:02}T{minute // 60 % 24:02}:{minute % 60:02}:00+00:00",
        "commit": "abcdef123456",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "python": "3.11.7",
        "shape": {
            **{"B": batch, "segments": [256, 64], "D": 1024, "H": 8, "F": 3072},
            **{"dtype": "bfloat16", "device": "cuda" if "capability" in device else "cpu"},
        },
        **device,
        **changes,
    }


def profile(device=CPU, backend="cpu", fused=1e-3):
    """Return a profile without "kind", like the first records."""

    def row(case):
        unit, calls = case.fwd(Shape()) / 4 * fused, calls_per_step(case, 400)
        return {
            **{"op": case.op, "title": case.title, "part_of": case.part_of},
            **{"forward_calls": calls[0], "backward_calls": calls[1]},
            "seconds": {
                "eager": [5 * unit, 7 * unit],
                "compile": [2 * unit, 3 * unit],
                "fused": [unit, 1.5 * unit],
            },
            "bytes": [case.fwd(Shape()) * 2621440, case.bwd(Shape()) * 2621440],
        }

    settings = {"backend": backend, "blocks": 400, "repeats": 30}
    copy = 2.5e12 if device is GPU else 2e10
    rows = [row(case) for case in PROFILE]
    return {"run": run(device, **settings), "copy_bytes_per_second": copy, "rows": rows}


def column(forward, backward, launches=(1, 2)):
    return {
        "seconds": [forward, backward, forward + backward],
        "host_seconds": 2e-5,
        "launches": launches and list(launches),
        "method": "graph replay",
    }


def ops(case=CASES[3], device=GPU, batch=4, **columns):
    """Return a point of a sweep in which liger fails and quack is not installed."""
    unit = batch * case.fwd(Shape()) * 1e-6
    timed = {
        "eager": column(8 * unit, 20 * unit),
        "compile": column(2 * unit, 3 * unit, launches=None),
        "triton": column(1.1 * unit, 2 * unit),
        "cuda": column(unit, 1.8 * unit),
        **columns,
    }
    return {
        "kind": "ops",
        "run": run(device, batch, repeats=30),
        **{"op": case.op, "title": case.title},
        "must_move": [batch * case.fwd(Shape()) * 655360, batch * case.bwd(Shape()) * 655360],
        "copy_bytes_per_second": 2.5e12 if device is GPU else 2e10,
        "columns": timed,
        "failed": {"liger": "result 0 | is <wrong>"} if "liger" not in timed else {},
        "missing": {"quack": "quack-kernels is not installed; pip install it"},
    }


CONFIG = asdict(preset("collapse400", device="cpu"))
TRAINED = {"preset": "collapse400", "config": CONFIG, "repeats": 7}


def in_loop(device=CPU, backend="cpu"):
    rows = [
        {
            **{"op": case.op, "title": case.title, "implementation": name},
            **{"forward_calls": 14, "backward_calls": 8},
            **{"forward_ms": 10 * factor, "backward_ms": 15 * factor},
        }
        for case in PROFILE[2:]
        for name, factor in (("eager", 3.0), (backend, 1.0))
    ]
    steps = {"step_ms": {"eager": 600.0, backend: 400.0}}
    steps["ranges_ms"] = {"eager": 630.0, backend: 420.0}
    return {"kind": "in_loop", "run": run(device, **TRAINED), "rows": rows, **steps}


def step(device=CPU):
    breakdown = {
        **{"matrix products": 0.3, "attention": 0.1, "operators": 0.15},
        **{"other pointwise": 0.05, "optimizer": 0.04, "communication": 0.0, "launch gaps": 0.01},
    }
    rows = [
        {
            **{"residual": "mvsplit", "implementation": name, "checkpointing": policy},
            **{"loader": 0.001, "gradients": 0.6, "update": 0.05, "breakdown": parts},
            **{"tokens_per_second": 5000.0, "flops": 1.3e12, "peak_bytes": peak},
        }
        for name in ("eager", "cpu")
        for policy, parts, peak in (("none", breakdown, 3e9), ("3/4", {}, None))
    ]
    rate = {"matmul_flops_per_second": 4e12}
    return {"kind": "step", "run": run(device, **TRAINED, **rate), "rows": rows}


def old_step():
    """Return a record of the time when rows named a backend and not an implementation."""
    row = {"residual": "post", "backend": "cpu", "gradients": 1.0, "update": 0.1}
    return {"kind": "step", "run": run(**TRAINED), "rows": [row]}


def traffic():
    """Return counts in which the published kernels lack an operator of the step."""
    rows = [
        {
            **{"op": case.op, "title": case.title, "direction": direction, "backend": backend},
            **{"must_move": moved, "read": moved * factor, "written": 1.0, "launches": 2},
            "calls": calls if case.profiled and not case.part_of else 0,
        }
        for case in CASES
        for backend, factor in (("reference", 9.0), ("triton", 1.2), ("published", 1.4))
        if (backend, case.op) != ("published", "rope_qk_norm")
        for direction, moved, calls in zip(
            ("fwd", "bwd"),
            (case.fwd(Shape()), case.bwd(Shape())),
            calls_per_step(case, 400),
            strict=True,
        )
    ]
    missing = {"cuda": "no <compiler>"}
    return {"kind": "traffic", "run": run(NO_DEVICE), "rows": rows, "missing": missing}


def machine(device=CPU):
    rates = {"copy_bytes_per_second": 2e10, "matmul_flops_per_second": 4e12}
    return {"kind": "machine", "run": run(device), **rates, "matmul_dtype": "bfloat16"}


def resources():
    row = {
        **{"call": "swiglu fwd", "backend": "triton", "name": "_fwd", "architecture": 90},
        **{"threads": 128, "registers": 40, "spilled": 0, "shared": 0, "cluster": 1, "bulk": 0},
        **{"loads": {"128": 4, "64": 2}, "stores": {"128": 1}, "seconds": 0.5},
        **{"blocks_per_sm": 12, "limited_by": "registers", "warps_share": 0.75},
    }
    compiled = run(NO_DEVICE, cuda_compiler="NVRTC 13.0")
    return {"kind": "resources", "run": compiled, "rows": [row], "missing": {"cuda": "no NVRTC"}}


def every_kind():
    sweep = [ops(case, GPU, batch) for case in CASES for batch in (1, 4, 16)]
    return [
        *(profile(), profile(GPU, "triton", 8e-6), *sweep, in_loop(), in_loop(GPU, "triton")),
        *(step(), old_step(), traffic(), machine(), machine(GPU), resources()),
    ]
