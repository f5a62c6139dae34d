"""Shared fixtures. Test modules import op_suite from this folder and bench from the checkout."""

import pytest
import torch

import mvsplit_ops as mv
from bench.static import cuda_emulator, triton_interpreter
from mvsplit_ops import _C

GPU = torch.cuda.is_available()
if not GPU:
    triton_interpreter.use()  # Triton's kernels on CPU tensors
    cuda_emulator.install()  # and CUDA's


def pytest_generate_tests(metafunc):
    """An OpSuite's `case` is each of its variants in turn, its `backend` each that runs here.

    A test that asks for `capability` meets the cpu backend with every instruction set.
    """
    if not hasattr(metafunc.cls, "variants"):
        return
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(metafunc.cls.variants), indirect=True)
    if "capability" in metafunc.fixturenames:
        cpu = [("cpu", name) for name in _C.capabilities()]
        triton, cuda = ("gpu", "gpu") if GPU else ("interpreted", "emulated")
        pairs = [*cpu, ("triton", triton), ("cuda", cuda)]
        metafunc.parametrize(("backend", "capability"), pairs, indirect=True)
    else:
        metafunc.parametrize("backend", ("cpu", "triton", "cuda"), indirect=True)


@pytest.fixture
def backend(request):
    """The backend of every call without one; new tensors are on its device."""
    device = "cuda" if GPU and request.param != "cpu" else "cpu"
    with mv.use_backend(request.param), torch.device(device):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def capability(request):
    """Each instruction set that this processor runs, in turn; the name of another backend's."""
    before = _C.capability()
    if request.param in _C.capabilities():
        _C.set_capability(request.param)
    yield request.param
    _C.set_capability(before)


@pytest.fixture
def threads():
    """Sets the number of CPU threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
