"""python -m mvsplit_ops: which backend runs each operator here, and why another cannot."""

import argparse

import torch

import mvsplit_ops as mv
from mvsplit_ops import _backends


def main(argv=None):
    argparse.ArgumentParser(prog="python -m mvsplit_ops", description=__doc__).parse_args(argv)
    state = mv.backends()
    print(f"mvsplit_ops {mv.__version__}, torch {torch.__version__}, {_device()}")
    for device in ("cpu", "cuda"):
        print(f"default for {device} tensors: {_backends.DEFAULTS[device]}")
    width = max(map(len, _backends.OPS))
    print(f"\n{'':{width}}  " + "  ".join(f"{b:>9}" for b in state))
    for op in _backends.OPS:
        marks = ("yes" if ops[op] is None else "-" for ops in state.values())
        print(f"{op:{width}}  " + "  ".join(f"{m:>9}" for m in marks))
    reasons = {(b, reason): None for b, ops in state.items() for reason in ops.values() if reason}
    if reasons:
        print()
    for backend, reason in reasons:
        print(f"{backend}: {reason}")


def _device():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    if _backends.missing("cpu", "rope", "cpu"):
        return gpu
    from mvsplit_ops import _C

    return f"CPU kernels for {_C.capability()} (of {', '.join(_C.capabilities())}), {gpu}"


if __name__ == "__main__":
    main()
