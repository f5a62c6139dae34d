"""Compilation of the kernels of backend cuda: the cache, the compilers, building ahead of time."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import torch

from mvsplit_ops import __main__ as command
from mvsplit_ops._cuda import compile
from mvsplit_ops._cuda.launch import Program

HERE = pathlib.Path(__file__).parent
SCALE = Program("scale", ("FACTOR=2",))
SOURCE = """
#include <common.cuh>
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR * ONE; }
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Create a kernel of one line, and temporary folders for sources, prebuilt and cache."""
    for name in ("sources", "prebuilt", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "sources" / "scale.cu").write_text(SOURCE)
    (tmp_path / "sources" / "common.cuh").write_text("#define ONE 1\n")
    (tmp_path / "sources" / "unused.cuh").write_text("")
    monkeypatch.setattr(compile, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(compile, "PREBUILT", tmp_path / "prebuilt")
    compile.use_cache(tmp_path / "cache")
    yield tmp_path
    compile.use_cache(None)


@pytest.fixture
def compiled(monkeypatch):
    """Return a list of the architectures that NVRTC compiles for, one per call."""
    calls, original = [], compile.Nvrtc.compile

    def counted(self, program, architecture):
        calls.append(architecture)
        return original(self, program, architecture)

    monkeypatch.setattr(compile.Nvrtc, "compile", counted)
    return calls


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- the cache ----


def test_a_program_is_compiled_once(folders, compiled):
    code = compile.load_or_compile(SCALE, "sm_90a")
    assert code.startswith(b"\x7fELF") and b".text.scale" in code
    (name,) = entries(folders / "cache")
    assert name.startswith("scale-sm_90a-") and name.endswith(".cubin")
    assert compile.load_or_compile(SCALE, "sm_90a") == code
    assert compiled == ["sm_90a"]


def test_every_change_of_the_code_makes_a_new_entry(folders, compiled, monkeypatch):
    def compiles_again():
        before = len(compiled)
        compile.load_or_compile(SCALE, "sm_90a")
        return len(compiled) == before + 1

    assert compiles_again() and not compiles_again()
    compile.load_or_compile(SCALE, "sm_80")
    compile.load_or_compile(Program("scale", ("FACTOR=3",)), "sm_90a")
    assert len(entries(folders / "cache")) == 3
    (folders / "sources" / "common.cuh").write_text("#define ONE 1.0f\n")
    assert compiles_again() and not compiles_again()
    (folders / "sources" / "unused.cuh").write_text("// may be included anywhere\n")
    assert compiles_again()
    (folders / "sources" / "scale.cu").write_text(SOURCE + "\n")
    assert compiles_again()
    monkeypatch.setattr(compile, "OPTIONS", (*compile.OPTIONS, "-DMORE"))
    assert compiles_again()
    monkeypatch.setattr(compile.nvrtc(), "key", "NVRTC 99.0")
    assert compiles_again() and not compiles_again()
    assert len(entries(folders / "cache")) == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "cut to its checksum", "one bit", "longer"])
def test_a_damaged_entry_is_compiled_again(folders, compiled, damage):
    code = compile.load_or_compile(SCALE, "sm_90a")
    (path,) = (folders / "cache").iterdir()
    good = path.read_bytes()
    bit = bytearray(good)
    bit[len(good) // 2] ^= 1
    shorter = {"empty": b"", "cut": good[:-1], "cut to its checksum": good[-32:]}
    path.write_bytes({**shorter, "one bit": bytes(bit), "longer": good + b"\0"}[damage])
    assert compile.load_or_compile(SCALE, "sm_90a") == code
    assert len(compiled) == 2 and path.read_bytes() == good


def test_two_processes_compile_the_same_program_at_once(folders):
    """Each starts before the other has finished, and both write the entry."""
    code = f"""
import hashlib, pathlib, sys, time
from mvsplit_ops._cuda import compile
from mvsplit_ops._cuda.launch import Program
root = pathlib.Path({str(folders)!r})
compile.SOURCES, compile.PREBUILT = root / "sources", root / "prebuilt"
compile.use_cache(root / "cache" / "new" / "folder")
original = compile.Nvrtc.compile
def slow(self, *args):
    (root / sys.argv[1]).touch()
    for _ in range(3000):
        if (root / "first").exists() and (root / "second").exists():
            return original(self, *args)
        time.sleep(0.01)
compile.Nvrtc.compile = slow
code = compile.load_or_compile(Program("scale", ("FACTOR=2",)), "sm_90a")
print(hashlib.sha256(code).hexdigest())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent.parent,
        )
        for name in ("first", "second")
    ]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(printed) == 1
    folder = folders / "cache" / "new" / "folder"
    (name,) = entries(folder)
    assert compile._read(folder / name) is not None


def test_the_error_names_a_folder_that_cannot_be_written(folders):
    (folders / "file").write_text("")
    compile.use_cache(folders / "file" / "below")
    with pytest.raises(RuntimeError) as error:
        compile.load_or_compile(SCALE, "sm_90a")
    text = str(error.value)
    assert f"cannot write compiled kernels in {folders / 'file' / 'below'}: Not a directory" in text
    assert "use_cache(folder)" in text and "build --cache FOLDER" in text


def test_a_full_disk_leaves_nothing_behind(folders, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(RuntimeError, match="cannot write .* No space left on device; make"):
        compile.load_or_compile(SCALE, "sm_90a")
    assert entries(folders / "cache") == []


def test_an_entry_in_a_read_only_folder_is_used(folders, compiled, monkeypatch):
    code = compile.load_or_compile(SCALE, "sm_90a")
    (folders / "cache").chmod(0o555)  # has no effect on root
    monkeypatch.setattr(compile, "_write", lambda path, code: pytest.fail("written"))
    assert compile.load_or_compile(SCALE, "sm_90a") == code and len(compiled) == 1
    (folders / "cache").chmod(0o755)


def test_an_unreadable_entry_is_an_error(folders):
    compile._entry_path(folders / "cache", SCALE, "sm_90a").mkdir()
    with pytest.raises(RuntimeError, match="cannot read compiled kernels in .*: Is a directory"):
        compile.load_or_compile(SCALE, "sm_90a")


def test_the_default_folder_is_in_the_home_folder(folders, monkeypatch):
    compile.use_cache(None)
    monkeypatch.setattr(pathlib.Path, "home", lambda: folders)
    assert compile.cache_folder() == folders / ".cache" / "mvsplit_ops"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    with pytest.raises(RuntimeError, match="no folder for compiled kernels: .*use_cache"):
        compile.load_or_compile(SCALE, "sm_90a")


def test_prebuilt_is_preferred_to_the_cache_and_needs_no_compiler(folders, monkeypatch):
    cached = compile.load_or_compile(SCALE, "sm_90a")
    shipped = compile._entry_path(folders / "prebuilt", SCALE, "sm_90a")
    compile._write(shipped, b"shipped")
    monkeypatch.setattr(compile, "nvrtc", lambda: pytest.fail("NVRTC was loaded"))
    assert compile.load_or_compile(SCALE, "sm_90a") == b"shipped"
    shipped.rename(folders / "cache" / shipped.name)  # build --compiler nvcc --cache
    assert compile.load_or_compile(SCALE, "sm_90a") == b"shipped"
    monkeypatch.undo()
    monkeypatch.setattr(compile, "SOURCES", folders / "sources")
    monkeypatch.setattr(compile, "PREBUILT", folders / "prebuilt")
    (folders / "cache" / shipped.name).write_bytes(b"damaged")
    assert compile.load_or_compile(SCALE, "sm_90a") == cached


# ---- the compilers ----


def test_a_kernel_that_does_not_compile_shows_the_log_and_the_options(folders):
    (folders / "sources" / "scale.cu").write_text("#include <common.cuh>\nnonsense;\n")
    with pytest.raises(RuntimeError) as error:
        compile.load_or_compile(SCALE, "sm_90a")
    text = str(error.value)
    assert f"{folders / 'sources' / 'scale.cu'} does not compile for sm_90a with NVRTC" in text
    assert "--gpu-architecture=sm_90a" in text and "--std=c++17 -DFACTOR=2" in text
    assert "scale.cu(2): error:" in text and "nonsense;" in text
    assert entries(folders / "cache") == []


def test_an_architecture_that_nvrtc_does_not_support():
    name = compile.nvrtc().name
    with pytest.raises(RuntimeError, match=f"{name} cannot compile for sm_250a.*a newer NVRTC"):
        compile.load_or_compile(SCALE, "sm_250a")
    with pytest.raises(RuntimeError, match=f"{name} cannot compile for sm_20, .*another NVRTC"):
        compile.load_or_compile(SCALE, "sm_20")
    with pytest.raises(ValueError, match="must look like sm_80 or sm_90a, got 'hopper'"):
        compile.load_or_compile(SCALE, "hopper")


def test_without_nvrtc_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(compile, "nvrtc", compile.Nvrtc)  # a new instance
    absent = types.SimpleNamespace(nvrtcVersion=lambda: dlopen("libnvrtc.so.13 not found"))

    def dlopen(text):
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr("cuda.bindings.nvrtc", absent)
        patch.setitem(sys.modules, "cuda.bindings.nvrtc", absent)
        with pytest.raises(RuntimeError, match="not found; run pip install nvidia-cuda-nvrtc"):
            compile.load_or_compile(SCALE, "sm_90a")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"cuda-python: .*pip install 'mvsplit-ops\[cuda\]'"):
        compile.load_or_compile(SCALE, "sm_90a")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_entries_of_nvcc_are_used_without_nvrtc(folders, monkeypatch):
    code, new = compile.build(SCALE, "sm_90a", compile.nvcc(), folders / "prebuilt")
    assert new and b".text.scale" in code
    monkeypatch.setattr(compile, "nvrtc", lambda: pytest.fail("NVRTC was loaded"))
    assert compile.load_or_compile(SCALE, "sm_90a") == code
    assert compile.build(SCALE, "sm_90a", compile.nvcc(), folders / "prebuilt") == (code, False)
    (folders / "sources" / "scale.cu").write_text("nonsense;\n")
    with pytest.raises(RuntimeError, match=r"(?s)scale\.cu does not compile .* nvcc .*nonsense"):
        compile.build(SCALE, "sm_90a", compile.nvcc(), folders / "prebuilt")
    with pytest.raises(RuntimeError, match="nvcc .* cannot compile for sm_250a, .*CUDA toolkit"):
        compile.build(SCALE, "sm_250a", compile.nvcc(), folders / "prebuilt")


def test_without_nvcc_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc is not on the PATH; .*--compiler nvrtc"):
        compile.Nvcc()


# ---- python -m mvsplit_ops build ----


def build(*arguments):
    with pytest.raises(SystemExit) as end:
        command.main(["build", *arguments])
    return end.value.code


def test_build_compiles_missing_programs(folders, compiled, monkeypatch, capsys):
    other = Program("scale", ("FACTOR=nonsense",))
    monkeypatch.setattr(command, "_list_programs", lambda arch, dtypes=(): [SCALE])
    arguments = "--arch", "sm_80", "sm_90a", "--cache", str(folders / "elsewhere")
    assert build(*arguments) == 0
    assert sorted(compiled) == ["sm_80", "sm_90a"] and len(entries(folders / "elsewhere")) == 2
    assert f"2 compiled, 0 already present: {folders / 'elsewhere'}" in capsys.readouterr().out
    monkeypatch.setattr(command, "_list_programs", lambda arch, dtypes=(): [SCALE, other])
    text = build(*arguments)
    assert "does not compile for sm_80" in text and "does not compile for sm_90a" in text
    assert "0 compiled, 2 already present, 2 failed" in capsys.readouterr().out
    monkeypatch.setattr(command, "_list_programs", lambda arch, dtypes=(): [SCALE])
    (folders / "file").write_text("")
    text = build("--arch", "sm_80", "sm_90a", "--cache", str(folders / "file"))
    assert text.count("cannot write compiled kernels") == 1
    assert "0 compiled, 0 already present, 2 failed" in capsys.readouterr().out
    text = build("--arch", "sm_250a", "sm_75", "hopper", "sm_80", "--cache", arguments[-1])
    assert "cannot compile for sm_250a" in text and "got 'hopper'" in text
    assert "--arch must be one of sm_80" in text
    assert "0 compiled, 1 already present: " in capsys.readouterr().out


def test_build_by_nvcc_fills_the_package_and_removes_outdated_entries(folders, monkeypatch, capsys):
    class Compiler(compile.Compiler):
        name, key, architectures = "nvcc 1.0", "", {80, 90}

        def compile(self, program, architecture):
            return b"compiled"

    monkeypatch.setattr(compile, "nvcc", Compiler)
    monkeypatch.setattr(command, "_list_programs", lambda arch, dtypes=(): [SCALE])
    assert build("--compiler", "nvcc", "--arch", "sm_80", "sm_90a") == 0
    before = entries(folders / "prebuilt")
    assert len(before) == 2 and "2 compiled" in capsys.readouterr().out
    (folders / "sources" / "common.cuh").write_text("#define ONE 2\n")
    assert build("--compiler", "nvcc", "--arch", "sm_90a") == 0
    (after,) = entries(folders / "prebuilt")
    assert after.startswith("scale-sm_90a-") and after not in before


def test_build_takes_dtypes_and_finds_architectures(folders, monkeypatch, capsys):
    requests = []
    monkeypatch.setattr(command, "_list_programs", lambda *request: requests.append(request) or [])
    assert build("--dtype", "fp32", "bf16", "--arch", "sm_80") == 0
    assert requests == [("sm_80", [torch.float32, torch.bfloat16])]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command._find_architectures() == ("sm_80", "sm_90a", "sm_100a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5), (9, 0)].__getitem__)
    assert command._find_architectures() == ["sm_90a"]
