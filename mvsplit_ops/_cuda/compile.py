"""Source to machine code: a cubin that was built before, or one that NVRTC makes now and keeps.

    binary(program, "sm_90a")     where launchers get it: PREBUILT, then the cache, then NVRTC
    build(program, ...)           the same ahead of time: python -m mvsplit_ops build, setup.py
    use_cache(folder)             where this process keeps what it compiles

The name of an entry holds a hash of all that the machine code follows from: the kernel's file,
every header, the options, the architecture, and NVRTC's version. Entries of nvcc, those that
setup.py ships among them, are named without a version, so that they are found where no compiler is.
An entry ends in its own checksum: one that is damaged counts as absent and is written again.
Nothing is read from the environment.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
# In a wheel the sources lie beside this file (pyproject.toml), in a checkout in csrc.
SOURCES = HERE / "csrc" if (HERE / "csrc").is_dir() else HERE.parents[1] / "csrc" / "cuda"
OPTIONS = ("--std=c++17",)  # as both compilers spell them

_chosen = None  # the folder of use_cache


def use_cache(folder):
    """Keep compiled kernels in `folder` from now on, in this process; None: the default again."""
    global _chosen
    _chosen = None if folder is None else Path(folder)


def cache():
    """The folder of compiled kernels: use_cache's, else ~/.cache/mvsplit_ops."""
    if _chosen is not None:
        return _chosen
    try:
        return Path.home() / ".cache" / "mvsplit_ops"
    except RuntimeError as error:
        raise RuntimeError(
            f"mvsplit_ops: no folder for compiled kernels: {error}; "
            "choose one with mvsplit_ops._cuda.compile.use_cache(folder)"
        ) from error


def binary(program, architecture):
    """The cubin of a Program for an architecture as compilers name it: "sm_80", "sm_90a"."""
    for folder in (PREBUILT, cache()):
        code = _read(_entry(folder, program, architecture))
        if code is not None:
            return code
    return build(program, architecture, nvrtc(), cache())[0]


def build(program, architecture, compiler, folder):
    """(cubin, whether it was compiled now): from its entry in `folder`, written if need be."""
    path = _entry(folder, program, architecture, compiler.key)
    code = _read(path)
    if code is not None:
        return code, False
    compiler.require(architecture)
    code = compiler.compile(program, architecture)
    _write(path, code)
    return code, True


def outdated(folder, programs):
    """The entries of nvcc in `folder` that belong to none of programs(architecture) any more."""
    held = sorted(Path(folder).glob("*-sm_*-*.cubin"))
    architectures = {path.name.split("-")[1] for path in held}
    current = {_entry(folder, p, a) for a in architectures for p in programs(a)}
    return [path for path in held if path not in current]


# ---- entries ----


def options(program):
    return (*OPTIONS, *(f"-D{define}" for define in program.defines))


def _headers():
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}


def _entry(folder, program, architecture, compiler=""):
    """Where the cubin of a program lies, by what it is made from."""
    text = (SOURCES / f"{program.source}.cu").read_text()
    made_from = [text, _headers(), options(program), architecture, compiler]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    return Path(folder) / f"{program.source}-{architecture}-{key}.cubin"


def _read(path):
    """The cubin of an entry; None where there is no entry, or one cut short or damaged."""
    try:
        held = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(path.parent, "read", error) from error
    code, digest = held[:-32], held[-32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path, code):
    """All of an entry or none of it, also when other processes write the same one."""
    # Not by tempfile, which would keep the users of a shared folder from each other's entries.
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


def _unusable(folder, verb, error):
    return RuntimeError(
        f"mvsplit_ops: cannot {verb} compiled kernels in {folder}: {error.strerror or error}; make "
        "the folder writable, or choose another with mvsplit_ops._cuda.compile.use_cache(folder) "
        "(and python -m mvsplit_ops build --cache FOLDER to fill it)"
    )


# ---- compilers ----


class Compiler:
    """NVRTC or nvcc.

    name           with its version: "NVRTC 13.0"
    key            what of it the names of its entries depend on
    architectures  numbers that it compiles for: {80, 90, ...}
    """

    def require(self, architecture):
        """RuntimeError, unless it can compile for an architecture."""
        number = _number(architecture)
        if number in self.architectures:
            return
        known = ", ".join(f"sm_{n}" for n in sorted(self.architectures))
        newer = number > max(self.architectures)
        raise RuntimeError(
            f"mvsplit_ops: {self.name} cannot compile for {architecture}, it knows {known}; "
            f"install {'a newer' if newer else 'another'} {self.package}"
        )

    def failed(self, program, architecture, line, log):
        return RuntimeError(
            f"mvsplit_ops: {SOURCES / program.source}.cu does not compile for {architecture} with "
            f"{self.name}; options: {' '.join(line)}\n{log.strip()}"
        )


class Nvrtc(Compiler):
    """The compiler that comes as a library, through cuda-python 12.9 or newer."""

    package = "NVRTC (pip install --upgrade nvidia-cuda-nvrtc)"

    def __init__(self):
        try:
            from cuda.bindings import nvrtc

            self._api = nvrtc
            version = self._call("nvrtcVersion")
        except ImportError as error:
            raise RuntimeError(
                f"mvsplit_ops: kernels are compiled through cuda-python: {error}; "
                "run pip install 'mvsplit-ops[cuda]'"
            ) from error
        except (RuntimeError, OSError) as error:  # cuda-python looks for it at the first call
            raise RuntimeError(
                f"mvsplit_ops: NVRTC, which compiles the kernels, does not load: {error}; "
                "run pip install nvidia-cuda-nvrtc (with a torch for CUDA 12: "
                "nvidia-cuda-nvrtc-cu12)"
            ) from error
        self.name = self.key = "NVRTC {}.{}".format(*version)
        self.architectures = set(self._call("nvrtcGetSupportedArchs"))
        # It would keep entries of its own beside the driver's, where and whether an environment
        # variable says; before 12.9 it had no such option.
        self._own = ["--no-cache"] if tuple(version) >= (12, 9) else []

    def _call(self, function, *args):
        """What an NVRTC function returns beside its status: nothing, a value, or several."""
        status, *values = getattr(self._api, function)(*args)
        if int(status):
            text = self._api.nvrtcGetErrorString(status)[1].decode()
            raise RuntimeError(f"mvsplit_ops: {function} failed: {text}")
        return values[0] if len(values) == 1 else values

    def compile(self, program, architecture):
        text, headers = (SOURCES / f"{program.source}.cu").read_bytes(), _headers()
        texts, names = [h.encode() for h in headers.values()], [n.encode() for n in headers]
        line = [f"--gpu-architecture={architecture}", *self._own, *options(program)]
        name = f"{program.source}.cu".encode()
        handle = self._call("nvrtcCreateProgram", text, name, len(names), texts, names)
        try:
            encoded = [option.encode() for option in line]
            (status,) = self._api.nvrtcCompileProgram(handle, len(encoded), encoded)
            if int(status):
                log = bytearray(self._call("nvrtcGetProgramLogSize", handle))
                self._call("nvrtcGetProgramLog", handle, log)
                text = log.rstrip(b"\0").decode(errors="replace")
                raise self.failed(program, architecture, line, text)
            code = bytearray(self._call("nvrtcGetCUBINSize", handle))
            self._call("nvrtcGetCUBIN", handle, code)
            return bytes(code)
        finally:
            self._api.nvrtcDestroyProgram(handle)


class Nvcc(Compiler):
    """The compiler of a CUDA toolkit."""

    package = "CUDA toolkit"
    key = ""

    def __init__(self):
        self.path = shutil.which("nvcc")
        if self.path is None:
            raise RuntimeError(
                "mvsplit_ops: nvcc is not on the PATH; add the bin folder of a CUDA toolkit, "
                "or run python -m mvsplit_ops build --compiler nvrtc"
            )
        version = re.search(r"release ([\d.]+)", self._run("--version").stdout)
        self.name = f"nvcc {version[1] if version else self.path}"
        self.architectures = set(
            map(int, re.findall(r"sm_(\d+)", self._run("--list-gpu-code").stdout))
        )

    def _run(self, *arguments):
        return subprocess.run([self.path, *arguments], capture_output=True, text=True)

    def compile(self, program, architecture):
        number = architecture.removeprefix("sm_")
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            line = [
                "-cubin",
                f"-gencode=arch=compute_{number},code=sm_{number}",
                *options(program),
                *("-I", str(SOURCES), "-o", str(cubin), str(SOURCES / f"{program.source}.cu")),
            ]
            done = self._run(*line)
            if done.returncode:
                raise self.failed(program, architecture, line, done.stderr + done.stdout)
            return cubin.read_bytes()


nvrtc = functools.cache(Nvrtc)
nvcc = functools.cache(Nvcc)


def _number(architecture):
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", architecture)
    if match is None:
        raise ValueError(
            f"mvsplit_ops: an architecture reads like sm_80 or sm_90a, got {architecture!r}"
        )
    return int(match[1])
