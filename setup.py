"""Build of the extension mvsplit_ops._C; pyproject.toml holds everything else about the package.

    pip install -e . --no-build-isolation

Build isolation must be off, because the extension has to be built against the torch that will load
it. The kernels in csrc/cpu are compiled once per instruction set, and the extension chooses one at
run time, so a build runs on other machines too. The kernels in csrc/cuda do not need a build: NVRTC
compiles them at first use. If nvcc is installed, the build compiles those of common model shapes
ahead of time.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        "mvsplit_ops: building the extension needs torch in this environment, but torch is not "
        "installed. Install it, then build without isolation:\n"
        "    pip install 'torch>=2.10' ninja pybind11 setuptools\n"
        "    pip install -e . --no-build-isolation"
    ) from error

KERNELS = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
HOST = sorted(str(p) for p in Path("csrc/host").glob("*.cpp"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fopenmp is not passed to the linker: the OpenMP runtime must be the one that torch has loaded.
COMMON = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wno-psabi",
]

# The baseline comes first: of an inline function or template that several instruction sets compile,
# the linker keeps the copy of the first object, which must run on every processor.
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
    """build_py that first compiles CUDA kernels into mvsplit_ops/_cuda/prebuilt if nvcc exists."""

    def run(self) -> None:
        if shutil.which("nvcc"):
            self.compile_cuda()
        super().run()

    def compile_cuda(self) -> None:
        """Run `python -m mvsplit_ops build`. A failure is only a warning: NVRTC can do it later."""
        arguments = ["build", "--compiler", "nvcc", "--dtype", "bf16", "--arch"]
        command = [sys.executable, "-m", "mvsplit_ops", *arguments, *CUDA_ARCHITECTURES]
        root = Path(__file__).resolve().parent
        process = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if process.returncode:
            lines = (process.stderr.strip() or "the build printed no error").splitlines()
            reason = next((line for line in lines if line.startswith("mvsplit_ops")), lines[-1])
            self.warn(
                "not all CUDA kernels were compiled ahead of time; NVRTC compiles the rest at "
                f"first use: {reason}"
            )


class Build(BuildExtension):
    """BuildExtension that compiles csrc/cpu once for each instruction set."""

    def build_extension(self, ext: Extension) -> None:
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
            HOST,
            include_dirs=[str(Path("csrc").resolve())],
            depends=HEADERS,
            extra_compile_args=[*COMMON, *(["-DMVSPLIT_X86"] if X86 else [])],
        )
    ],
    cmdclass={"build_ext": Build, "build_py": Package},
)
