"""The calls of backend cuda to the CUDA driver, recorded by a stand-in (fake_driver.c)."""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import pytest
import torch

import mvsplit_ops as mv
from mvsplit_ops._cuda import gpu

HERE = pathlib.Path(__file__).parent
CONTEXT = {0: "0xc0de46", 1: "0xc0de47"}  # as the stand-in numbers its GPUs


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return {case of fake_driver.py: its value, error and log}."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in of the driver")
    folder = tmp_path_factory.mktemp("driver")
    flags = "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden"
    source = HERE / "fake_driver.c"
    subprocess.run(["gcc", *flags, "-o", folder / "libcuda.so.1", source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, HERE / "fake_driver.py", folder, folder / "cache"],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def calls(result, function):
    """Return the arguments of each call of a driver function."""
    lines = (line.partition(" ") for line in result["log"])
    return [arguments for name, _, arguments in lines if name == function]


def launches(result):
    assert result["error"] is None
    lines = (line.split() for line in calls(result, "cuLaunchKernelEx"))
    return [{"kernel": kernel, **dict(p.split("=", 1) for p in pairs)} for kernel, *pairs in lines]


def test_limits_come_from_the_driver(cases):
    limits = cases["limits"]["value"]
    too_old = limits.pop("7.5")
    assert "backend 'cuda' cannot run on cuda:0: compute capability must be 8.0" in too_old
    assert "got 7.5; pass backend='reference'" in too_old
    memory = {"shared": 227 << 10, "shared_sm": 228 << 10}
    assert limits == {
        "8.0": {"architecture": "sm_80", "cluster": 0, **memory},
        "8.6": {"architecture": "sm_86", "cluster": 0, **memory},
        "9.0": {"architecture": "sm_90a", "cluster": 16, **memory},
        "10.3": {"architecture": "sm_103a", "cluster": 16, **memory},
        "12.0": {"architecture": "sm_120a", "cluster": 8, **memory},
    }


def test_the_first_launch_loads_the_kernel_and_passes_its_arguments(cases):
    result = cases["first_launch"]
    assert calls(result, "cuDevicePrimaryCtxRetain") == ["71"]  # of GPU 1
    assert len(calls(result, "cuModuleLoadData")) == 1  # the stand-in accepts only cubins
    assert calls(result, "cuModuleGetFunction") == ["swiglu_fwd"]
    address = result["value"]
    (launch,) = launches(result)
    # The stand-in reads as many bytes as the compiled kernel takes.
    assert (
        launch.pop("arguments")
        == struct.pack(
            "13q", address, address, 0, address, address, 0, 16, 32, 32, 0, 16, 4, 16
        ).hex()
    )
    assert launch == {
        "kernel": "swiglu_fwd",
        "grid": "3,1,1",
        "block": "256,1,1",
        "shared": "0",
        "stream": "0x58",
        "context": CONTEXT[1],
    }


def test_a_later_launch_is_one_call(cases):
    assert len(cases["second_launch"]["log"]) == 1
    assert len(launches(cases["second_launch"])) == 1
    assert cases["no_blocks"] == {"value": None, "error": None, "log": []}


def test_clusters_and_shared_memory_are_requested(cases):
    result = cases["cluster_and_shared_memory"]
    requested = [(x["attribute"], int(x["shared"]) >> 10) for x in launches(result)]
    # Attribute 4 of a launch is the cluster.
    assert requested == [("4:8,1,1", 48), ("4:16,1,1", 200), ("4:4,1,1", 100), ("4:2,1,1", 201)]
    # Attributes of a function: 8 is shared memory, which never shrinks, 9 its share of L1, and 14
    # allows clusters of more than 8 blocks.
    assert calls(result, "cuFuncSetAttribute") == [
        *("swiglu_bwd 9 100",),
        *(f"swiglu_bwd 8 {200 << 10}", "swiglu_bwd 9 100", "swiglu_bwd 14 1"),
        *("swiglu_bwd 9 100",),
        *(f"swiglu_bwd 8 {201 << 10}", "swiglu_bwd 9 100"),
    ]


def test_a_launch_goes_to_the_current_stream(cases):
    assert [x["stream"] for x in launches(cases["streams"])] == ["0x1", "0x8", "0x7fff12345679"]


def test_the_context_of_the_gpu_is_current_only_for_the_launch(cases):
    """If another GPU is current, and on a thread without a context."""
    for case, after in (("another_gpu_is_current", True), ("thread_without_a_context", [0])):
        (launch,) = launches(cases[case])
        assert launch["context"] == CONTEXT[1] and cases[case]["value"] == after
        functions = [line.split()[0] for line in cases[case]["log"]]
        assert functions == ["cuCtxPushCurrent", "cuLaunchKernelEx", "cuCtxPopCurrent"]
    error, current = cases["context_after_an_error"]["value"]
    assert "cuFuncSetAttribute failed on cuda:0 (swiglu.cu, swiglu_fwd" in error and current == 0


def test_threads_do_not_share_arguments(cases):
    fields = [bytes.fromhex(x["arguments"]) for x in launches(cases["threads_at_once"])]
    numbers = sorted(struct.unpack("13q", each)[11] for each in fields)
    assert numbers == [1000 * i + n for i in range(4) for n in range(50)]


def test_the_cache_of_configurations_is_bounded(cases):
    grids = [x["grid"] for x in launches(cases["many_shapes"])]
    assert grids == [f"{n},1,1" for n in range(1, 30)]
    assert cases["many_shapes"]["value"] <= 8


def test_holds_asks_the_driver_once(cases):
    result = cases["holds"]
    # The stand-in does not hold clusters of 16 blocks; 32 blocks and 300 KiB exceed the limits.
    assert result["value"] == {
        "0 0": True,
        "0 300": False,
        "8 60": True,
        "16 0": False,
        "32 0": False,
    }
    queries = [line.split() for line in calls(result, "cuOccupancyMaxActiveClusters")]
    assert [(x[1], x[-1]) for x in queries] == [
        ("grid=8,1,1", "attribute=4:8,1,1"),
        ("grid=16,1,1", "attribute=4:16,1,1"),
    ]
    assert f"swiglu_bwd 8 {60 << 10}" in calls(result, "cuFuncSetAttribute")


def test_nothing_is_loaded_while_a_graph_is_captured(cases):
    assert len(cases["capture_of_a_loaded_kernel"]["log"]) == 1
    assert cases["capture_of_a_loaded_kernel"]["error"] is None
    result = cases["capture_before_the_first_launch"]
    assert not calls(result, "cuModuleLoadData") and not calls(result, "cuLaunchKernelEx")
    assert (
        "swiglu.cu, swiglu_fwd, DTYPE=bfloat16 VEC=8: a kernel cannot be loaded"
        in (result["error"])
    )
    assert "run the same forward and backward once before the capture" in result["error"]


def test_errors_of_the_driver_name_the_call_and_the_kernel(cases):
    text = cases["launch_fails"]["error"]
    assert "cuLaunchKernelEx failed on cuda:1 (swiglu.cu, Launch(kernel='swiglu_fwd'" in text
    assert "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered" in text
    text = cases["load_fails"]["error"]
    assert "cuModuleLoadData failed on cuda:0 (swiglu.cu, swiglu_fwd, DTYPE=bfloat16" in text
    assert "the driver is for CUDA 12.4" in text and "may need a newer driver" in text
    assert "cuModuleGetFunction failed" in cases["no_such_kernel"]["error"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_launch_runs_again():
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    mv.swiglu(x, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mv.swiglu(x, backend="cuda")
    x.normal_()
    graph.replay()
    assert torch.equal(y, mv.swiglu(x, backend="cuda"))
    device = gpu.get_gpu(x.get_device())
    device._kernels.clear()
    device._ready.clear()
    refused = pytest.raises(RuntimeError, match="cannot be loaded while a CUDA graph is captured")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        mv.swiglu(x, backend="cuda")


def test_the_reason_why_no_gpu_can_be_used(monkeypatch):
    def reason(version="13.0.1", cuda="13.0", available=True, capability=(9, 0)):
        monkeypatch.setattr("cuda.bindings.__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", [(7, 0), capability].__getitem__)
        return gpu.find_missing()

    assert reason() is None
    assert reason("12.9.4") is None
    assert "cuda-python must be 12.9 or newer, got 12.8.0; run pip" in reason("12.8.0")
    assert "is built without CUDA" in reason(cuda=None)
    assert "torch finds no CUDA device" in reason(available=False)
    assert reason(capability=(7, 5)) == "compute capability must be 8.0 or newer, got 7.5"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda", None)
        patch.setattr(gpu.importlib.metadata, "version", lambda name: "12.2.0")
        assert "got 12.2.0" in gpu.find_missing()
        patch.setattr(gpu.importlib.metadata, "version", absent)
        assert gpu.find_missing() == (
            "cuda-python is not installed; run pip install 'mvsplit-ops[cuda]'"
        )


def absent(name):
    raise gpu.importlib.metadata.PackageNotFoundError(name)
