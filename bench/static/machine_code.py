"""Reading of compiled GPU kernels: resources, shared memory, global accesses and bulk copies.

From a cubin with the tools of a CUDA toolkit (cuobjdump, nvdisasm), and from PTX.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from bench.static.occupancy import RESERVED

CUBIN_TOOLS = "cuobjdump", "nvdisasm"


@functools.cache  # several calls share a kernel
def read_resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Return {kernel: {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}} of a cubin."""
    text = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
    lines = re.findall(r"Function (\w+):\s*(.*)", text)
    return {
        name: {k: int(n) for k, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in lines
    }


@functools.cache
def disassemble(cubin: bytes) -> dict[str, str]:
    """Return {kernel: its machine code (SASS)} of a cubin."""
    sections = re.split(r"\.section\s+\.text\.(\w+)", _run_tool("nvdisasm", "--print-code", cubin))
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def count_static_shared(resources: dict[str, int], architecture: int) -> int:
    """Return the bytes of shared memory that a kernel declares itself."""
    # From compute capability 9.0 a cubin includes what CUDA reserves, if the kernel has any.
    return max(resources["SHARED"] - (RESERVED if architecture >= 90 else 0), 0)


def count_ptx_accesses(ptx: str, kind: str) -> dict[int, int]:
    """Return {bits: number} of the global accesses of a kind, "ld" or "st", in PTX."""
    accesses = re.findall(rf"\b{kind}\.global((?:\.[\w:]+)*)", ptx)
    return dict(Counter(map(_access_bits, accesses)))


def _access_bits(modifiers: str) -> int:
    vector = re.search(r"\.v(\d+)", modifiers)
    element = re.search(r"\.[bufs](\d+)", modifiers)
    if element is None:
        raise ValueError(f"expected the type of a global access in PTX, got {modifiers!r}")
    return int(element[1]) * (int(vector[1]) if vector else 1)


def count_sass_accesses(code: str, kind: str) -> dict[int, int]:
    """Return {bits: number} of the global accesses of a kind, "ld" or "st", in machine code."""
    names = {"ld": "LDG|LDGSTS", "st": "STG"}[kind]
    accesses = re.findall(rf"\b(?:{names})\b((?:\.\w+)*)", code)
    bits = (re.findall(r"\.[US]?(\d+)\b", modifiers) or ["32"] for modifiers in accesses)
    return dict(Counter(int(numbers[-1]) for numbers in bits))


def count_bulk_copies(code: str) -> int:
    """Return the copies of any length from global to shared memory, in machine code or PTX."""
    return len(re.findall(r"\bUBLKCP\.S\.G|\bcp\.async\.bulk\.shared\S*\.global", code))


def find_tool(name: str) -> str:
    """Return the path of a tool that reads cubins: bundled with Triton, or of a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin or "").parent if triton else Path()
    bundled = folder / "backends/nvidia/bin" / name
    path = str(bundled) if bundled.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(
            f"{name}, which reads machine code, is neither in Triton nor on the PATH; "
            "run pip install 'mvsplit-ops[triton]', or add the bin folder of a CUDA toolkit"
        )
    return path


def _run_tool(name: str, option: str, cubin: bytes) -> str:
    """Return what a tool of a CUDA toolkit prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_tool(name), option, file.name]
        process = subprocess.run(command, capture_output=True, check=True)
    return process.stdout.decode(errors="replace")
