"""Builds mvsplit_ops._C; everything else about the package is in pyproject.toml.

    pip install -e . --no-build-isolation

No build isolation: the extension must be built against the torch that will load it. The kernels in
csrc/cpu are compiled once per instruction set and chosen at run time, so that a build made on one
machine runs on another. Those in csrc/cuda need no build: what models of usual shapes take of them
is compiled here all the same where there is an nvcc, and the rest at first use.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        "mvsplit_ops: torch must be installed first, and the build must see it:\n"
        "    pip install 'torch>=2.10' ninja pybind11 setuptools\n"
        "    pip install -e . --no-build-isolation"
    ) from error

KERNELS = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fopenmp is given to the compiler alone: the OpenMP runtime must be the one that torch has loaded.
COMMON = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",
]

# Slowest first. A template or inline function that two instruction sets both compile is kept once,
# from the object that comes first, so this order keeps the baseline's copy.
INSTRUCTION_SETS = {"DEFAULT": []}
if X86:
    INSTRUCTION_SETS["AVX2"] = ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["AVX512"] = [
        "-DCPU_CAPABILITY_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ]
    INSTRUCTION_SETS["AVX512_BF16"] = [*INSTRUCTION_SETS["AVX512"], "-mavx512bf16"]

CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")


class Package(build_py):
    """build_py that first fills mvsplit_ops/_cuda/prebuilt, as far as an nvcc can."""

    def run(self):
        if shutil.which("nvcc"):
            self.compile_cuda()
        super().run()

    def compile_cuda(self):
        arguments = ["build", "--compiler", "nvcc", "--dtype", "bf16", "--arch"]
        command = [sys.executable, "-m", "mvsplit_ops", *arguments, *CUDA_ARCHITECTURES]
        root = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()
            reason = next((line for line in reason if line.startswith("mvsplit_ops")), reason[-1])
            self.warn(f"not every CUDA kernel was built now; NVRTC will, at first use: {reason}")


class Build(BuildExtension):
    """BuildExtension that compiles csrc/cpu once for each instruction set."""

    def build_extension(self, ext):
        ext.extra_objects = []
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=ext.include_dirs,
                extra_postargs=[*COMMON, f"-DCPU_CAPABILITY={name}", *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        CppExtension(
            "mvsplit_ops._C",
            ["csrc/host/module.cpp"],
            include_dirs=[str(Path("csrc").resolve())],
            depends=HEADERS,
            extra_compile_args=[*COMMON, *(["-DMVSPLIT_X86"] if X86 else [])],
        )
    ],
    cmdclass={"build_ext": Build, "build_py": Package},
)
