"""Cases of mvsplit_ops._cuda.gpu, run in a process whose libcuda.so.1 is built from fake_driver.c.

test_gpu.py runs this file with two folders, of the library and of compiled kernels. It prints
{case: {"value", "error", "log"}} as JSON, where `log` lists the calls of the driver. torch may have
no CUDA: the functions that gpu.py calls are replaced below.
"""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from mvsplit_ops._cuda import compile, gpu
from mvsplit_ops._cuda.launch import Launch, Program

SWIGLU = Program("swiglu", ("DTYPE=bfloat16", "VEC=8"))
FORWARD = Launch("swiglu_fwd", 3, 256)
X = torch.zeros(2, 32, dtype=torch.bfloat16)
# gate, value, dy, y, dvalue; offsets of gate and value; four row strides; vectors, F
ARGUMENTS = (X, X, None, X, X, 0, 16, 32, 32, 0, 16, 4, 16)

torch_state = {"stream": 0x57, "capturing": False, "device": 0}
cases = []


@contextlib.contextmanager
def set_device(index):
    before, torch_state["device"] = torch_state["device"], index
    yield
    torch_state["device"] = before


torch.cuda.device = set_device
torch.cuda.is_current_stream_capturing = lambda: torch_state["capturing"]
torch.cuda.current_stream = lambda index: SimpleNamespace(cuda_stream=torch_state["stream"] + index)


def case(function):
    cases.append(function)
    return function


def driver():
    from cuda.bindings import driver

    return driver


def load_kernels(index=1):
    """Return a GPU on which two kernels have run, and clear the log."""
    device = gpu.GPU(index)
    device.launch(SWIGLU, FORWARD, ARGUMENTS)
    device.launch(SWIGLU, Launch("swiglu_bwd", 3, 256), ARGUMENTS)
    driver().cuCtxSetCurrent(device._context)
    forget()
    return device


def forget():
    Path(os.environ["FAKE_CUDA_LOG"]).write_text("")


@case
def limits():
    results = {}
    for capability in ("7.5", "8.0", "8.6", "9.0", "10.3", "12.0"):
        os.environ["FAKE_CUDA_GPU"] = capability
        try:
            results[capability] = vars(gpu.GPU(0).limits)
        except RuntimeError as error:
            results[capability] = str(error)
    del os.environ["FAKE_CUDA_GPU"]
    return results


@case
def first_launch():
    gpu.GPU(1).launch(SWIGLU, FORWARD, ARGUMENTS)
    return X.data_ptr()


@case
def second_launch():
    load_kernels().launch(SWIGLU, FORWARD, ARGUMENTS)


@case
def no_blocks():
    load_kernels().launch(SWIGLU, Launch("swiglu_fwd", 0, 256), ARGUMENTS)


@case
def cluster_and_shared_memory():
    device = load_kernels()
    for cluster, shared in ((8, 48 << 10), (16, 200 << 10), (4, 100 << 10), (2, 201 << 10)):
        device.launch(SWIGLU, Launch("swiglu_bwd", 32, 256, cluster, shared), ARGUMENTS)


@case
def streams():
    device = load_kernels()
    for stream in (0, 7, 0x7FFF12345678):
        torch_state["stream"] = stream
        device.launch(SWIGLU, FORWARD, ARGUMENTS)
    torch_state["stream"] = 0x57


@case
def another_gpu_is_current():
    device, other = load_kernels(1), load_kernels(0)
    device.launch(SWIGLU, FORWARD, ARGUMENTS)
    return int(driver().cuCtxGetCurrent()[1]) == other._context_address


@case
def thread_without_a_context():
    device, after = load_kernels(), []

    def run():
        device.launch(SWIGLU, FORWARD, ARGUMENTS)
        after.append(int(driver().cuCtxGetCurrent()[1]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return after


@case
def threads_at_once():
    """Each launch gets the arguments of its own call while other threads launch too."""
    device = load_kernels()

    def run(first):
        for n in range(first, first + 50):
            device.launch(SWIGLU, FORWARD, (*[None] * 5, *[0] * 6, n, 0))

    threads = [threading.Thread(target=run, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@case
def many_shapes():
    device, gpu.MOST_CONFIGURATIONS = load_kernels(), 8
    for grid in range(1, 30):
        device.launch(SWIGLU, Launch("swiglu_fwd", grid, 256), ARGUMENTS)
    return len(device._ready)


@case
def holds():
    device, fits = load_kernels(), {}
    for cluster, shared in ((0, 0), (0, 300 << 10), (8, 60 << 10), (16, 0), (32, 0), (8, 60 << 10)):
        launch = Launch("swiglu_bwd", 64, 256, cluster, shared)
        fits[f"{cluster} {shared >> 10}"] = device.holds(SWIGLU, launch)
    return fits


@case
def capture_of_a_loaded_kernel():
    device = load_kernels()
    torch_state["capturing"] = True
    device.launch(SWIGLU, FORWARD, ARGUMENTS)


@case
def capture_before_the_first_launch():
    device = gpu.GPU(0)
    forget()
    torch_state["capturing"] = True
    device.launch(SWIGLU, FORWARD, ARGUMENTS)


@case
def launch_fails():
    device = load_kernels()
    os.environ["FAKE_CUDA_FAIL"] = "cuLaunchKernelEx"
    device.launch(SWIGLU, FORWARD, ARGUMENTS)


@case
def load_fails():
    os.environ["FAKE_CUDA_FAIL"] = "cuModuleLoadData"
    gpu.GPU(0).launch(SWIGLU, FORWARD, ARGUMENTS)


@case
def no_such_kernel():
    gpu.GPU(0).launch(SWIGLU, Launch("swiglu", 3, 256), ARGUMENTS)


@case
def context_after_an_error():
    device = gpu.GPU(0)
    os.environ["FAKE_CUDA_FAIL"] = "cuFuncSetAttribute"
    try:
        device.launch(SWIGLU, Launch("swiglu_fwd", 16, 256, cluster=16), ARGUMENTS)
    except RuntimeError as error:
        return str(error), int(driver().cuCtxGetCurrent()[1])


def run(function):
    forget()
    result = {"value": None, "error": None}
    try:
        result["value"] = function()
    except RuntimeError as error:
        result["error"] = str(error)
    finally:
        torch_state["capturing"] = False
        os.environ.pop("FAKE_CUDA_FAIL", None)
        driver().cuCtxSetCurrent(0)
    result["log"] = Path(os.environ["FAKE_CUDA_LOG"]).read_text().splitlines()
    return result


if __name__ == "__main__":
    os.environ["FAKE_CUDA_LOG"] = str(Path(sys.argv[1]) / "log")
    compile.use_cache(sys.argv[2])
    json.dump({function.__name__: run(function) for function in cases}, sys.stdout)
