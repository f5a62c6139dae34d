"""Compilation of csrc/cuda to machine code, and the disk cache of the results.

    load_or_compile(program, "sm_90a")   for launchers: from PREBUILT, else the cache, else by NVRTC
    build(program, ...)                  ahead of time: python -m mvsplit_ops build, setup.py
    use_cache(folder)                    where this process keeps what it compiles

The file name of a cache entry holds a hash of everything that determines the machine code: the
kernel's file, every header, the options, the architecture, and the version of NVRTC. The names of
nvcc's entries, which setup.py ships, hold no version, so they are used where no compiler is
installed. An entry ends with its own checksum; a damaged entry is compiled again. Nothing is read
from the environment.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mvsplit_ops._cuda.launch import Program

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
# A wheel has the sources in this folder (pyproject.toml), a checkout in csrc.
SOURCES = HERE / "csrc" if (HERE / "csrc").is_dir() else HERE.parents[1] / "csrc" / "cuda"
OPTIONS = ("--std=c++17",)  # spelled the same way for both compilers

_chosen_folder: Path | None = None


def use_cache(folder: str | Path | None) -> None:
    """Keep compiled kernels in `folder` from now on, in this process; None: the default folder."""
    global _chosen_folder
    _chosen_folder = None if folder is None else Path(folder)


def cache_folder() -> Path:
    """Return the folder of compiled kernels: use_cache's, else ~/.cache/mvsplit_ops."""
    if _chosen_folder is not None:
        return _chosen_folder
    try:
        return Path.home() / ".cache" / "mvsplit_ops"
    except RuntimeError as error:
        raise RuntimeError(
            f"mvsplit_ops: no folder for compiled kernels: {error}; "
            "choose one with mvsplit_ops._cuda.compile.use_cache(folder)"
        ) from error


def load_or_compile(program: Program, architecture: str) -> bytes:
    """Return the cubin of a Program for an architecture as compilers name it, such as "sm_90a"."""
    for folder in (PREBUILT, cache_folder()):
        code = _read(_entry_path(folder, program, architecture))
        if code is not None:
            return code
    return build(program, architecture, nvrtc(), cache_folder())[0]


def build(
    program: Program, architecture: str, compiler: "Compiler", folder: str | Path
) -> tuple[bytes, bool]:
    """Return the cubin of a Program, and whether it had to be compiled and written to `folder`."""
    path = _entry_path(folder, program, architecture, compiler.key)
    code = _read(path)
    if code is not None:
        return code, False
    compiler.require(architecture)
    code = compiler.compile(program, architecture)
    _write(path, code)
    return code, True


def find_outdated(
    folder: str | Path, list_programs: Callable[[str], Sequence[Program]]
) -> list[Path]:
    """Return nvcc's entries in `folder` that belong to none of list_programs(architecture)."""
    paths = sorted(Path(folder).glob("*-sm_*-*.cubin"))
    architectures = {path.name.split("-")[1] for path in paths}
    current = {_entry_path(folder, p, a) for a in architectures for p in list_programs(a)}
    return [path for path in paths if path not in current]


# ---- entries ----


def list_options(program: Program) -> tuple[str, ...]:
    return (*OPTIONS, *(f"-D{define}" for define in program.defines))


def _read_headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}


def _entry_path(
    folder: str | Path, program: Program, architecture: str, compiler_key: str = ""
) -> Path:
    """Return the path of a program's cubin, whose name depends on everything it is made from."""
    text = (SOURCES / f"{program.source}.cu").read_text()
    inputs = [text, _read_headers(), list_options(program), architecture, compiler_key]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    return Path(folder) / f"{program.source}-{architecture}-{key}.cubin"


def _read(path: Path) -> bytes | None:
    """Return the cubin of an entry; None if there is no entry, or if it is damaged."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(path.parent, "read", error) from error
    code, digest = data[:-32], data[-32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write a whole entry or nothing, even if other processes write the same one."""
    # tempfile would make the entries of a shared folder unreadable for other users.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(code + hashlib.sha256(code).digest())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(path.parent, "write", error) from error


def _unusable(folder: Path, verb: str, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"mvsplit_ops: cannot {verb} compiled kernels in {folder}: {error.strerror or error}; make "
        "the folder writable, or choose another with mvsplit_ops._cuda.compile.use_cache(folder) "
        "(and python -m mvsplit_ops build --cache FOLDER to fill it)"
    )


# ---- compilers ----


class Compiler:
    """NVRTC or nvcc.

    name           with its version: "NVRTC 13.0"
    key            the part of it that the names of its entries depend on
    architectures  numbers that it compiles for: {80, 90, ...}
    package        what to install to get it
    """

    name: str
    key: str
    architectures: set[int]
    package: str

    def require(self, architecture: str) -> None:
        """Raise RuntimeError unless this compiler can compile for an architecture."""
        number = _to_number(architecture)
        if number in self.architectures:
            return
        known = ", ".join(f"sm_{n}" for n in sorted(self.architectures))
        newer = number > max(self.architectures)
        raise RuntimeError(
            f"mvsplit_ops: {self.name} cannot compile for {architecture}, only for {known}; "
            f"install {'a newer' if newer else 'another'} {self.package}"
        )

    def compile(self, program: Program, architecture: str) -> bytes:
        """Return the cubin of a Program. RuntimeError: the source does not compile."""
        raise NotImplementedError

    def _failure(
        self, program: Program, architecture: str, line: Sequence[str], log: str
    ) -> RuntimeError:
        return RuntimeError(
            f"mvsplit_ops: {SOURCES / program.source}.cu does not compile for {architecture} with "
            f"{self.name}; options: {' '.join(line)}\n{log.strip()}"
        )


class Nvrtc(Compiler):
    """NVIDIA's compiler as a library, through cuda-python 12.9 or newer."""

    package = "NVRTC (pip install --upgrade nvidia-cuda-nvrtc)"

    def __init__(self) -> None:
        try:
            from cuda.bindings import nvrtc

            self._api: Any = nvrtc
            version = self._call("nvrtcVersion")
        except ImportError as error:
            raise RuntimeError(
                f"mvsplit_ops: kernels are compiled through cuda-python: {error}; "
                "run pip install 'mvsplit-ops[cuda]'"
            ) from error
        except (RuntimeError, OSError) as error:  # cuda-python loads NVRTC at the first call
            raise RuntimeError(
                f"mvsplit_ops: NVRTC, which compiles the kernels, does not load: {error}; "
                "run pip install nvidia-cuda-nvrtc (with a torch for CUDA 12: "
                "nvidia-cuda-nvrtc-cu12)"
            ) from error
        self.name = self.key = "NVRTC {}.{}".format(*version)
        self.architectures = set(self._call("nvrtcGetSupportedArchs"))
        # NVRTC has a cache of its own in the driver's, which environment variables configure. The
        # option that turns it off exists since 12.9.
        self._no_cache = ["--no-cache"] if tuple(version) >= (12, 9) else []

    def _call(self, function: str, *args: Any) -> Any:
        """Call an NVRTC function; return what it returns after its status: a value, or several."""
        status, *values = getattr(self._api, function)(*args)
        if int(status):
            text = self._api.nvrtcGetErrorString(status)[1].decode()
            raise RuntimeError(f"mvsplit_ops: {function} failed: {text}")
        return values[0] if len(values) == 1 else values

    def compile(self, program: Program, architecture: str) -> bytes:
        text, headers = (SOURCES / f"{program.source}.cu").read_bytes(), _read_headers()
        texts, names = [h.encode() for h in headers.values()], [n.encode() for n in headers]
        line = [f"--gpu-architecture={architecture}", *self._no_cache, *list_options(program)]
        name = f"{program.source}.cu".encode()
        handle = self._call("nvrtcCreateProgram", text, name, len(names), texts, names)
        try:
            encoded = [option.encode() for option in line]
            (status,) = self._api.nvrtcCompileProgram(handle, len(encoded), encoded)
            if int(status):
                log = bytearray(self._call("nvrtcGetProgramLogSize", handle))
                self._call("nvrtcGetProgramLog", handle, log)
                messages = log.rstrip(b"\0").decode(errors="replace")
                raise self._failure(program, architecture, line, messages)
            code = bytearray(self._call("nvrtcGetCUBINSize", handle))
            self._call("nvrtcGetCUBIN", handle, code)
            return bytes(code)
        finally:
            self._api.nvrtcDestroyProgram(handle)


class Nvcc(Compiler):
    """The compiler of a CUDA toolkit."""

    package = "CUDA toolkit"
    key = ""

    def __init__(self) -> None:
        path = shutil.which("nvcc")
        if path is None:
            raise RuntimeError(
                "mvsplit_ops: nvcc is not on the PATH; add the bin folder of a CUDA toolkit, "
                "or run python -m mvsplit_ops build --compiler nvrtc"
            )
        self.path = path
        version = re.search(r"release ([\d.]+)", self._run("--version").stdout)
        self.name = f"nvcc {version[1] if version else self.path}"
        self.architectures = set(
            map(int, re.findall(r"sm_(\d+)", self._run("--list-gpu-code").stdout))
        )

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.path, *arguments], capture_output=True, text=True)

    def compile(self, program: Program, architecture: str) -> bytes:
        number = architecture.removeprefix("sm_")
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            line = [
                "-cubin",
                f"-gencode=arch=compute_{number},code=sm_{number}",
                *list_options(program),
                *("-I", str(SOURCES), "-o", str(cubin), str(SOURCES / f"{program.source}.cu")),
            ]
            process = self._run(*line)
            if process.returncode:
                messages = process.stderr + process.stdout
                raise self._failure(program, architecture, line, messages)
            return cubin.read_bytes()


nvrtc = functools.cache(Nvrtc)
nvcc = functools.cache(Nvcc)


def _to_number(architecture: str) -> int:
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", architecture)
    if match is None:
        raise ValueError(
            f"mvsplit_ops: an architecture must look like sm_80 or sm_90a, got {architecture!r}"
        )
    return int(match[1])
