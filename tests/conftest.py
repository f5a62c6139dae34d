"""Fixtures of all tests. Test modules import tests.op_suite, and bench from the checkout."""

import pytest
import torch

import mvsplit_ops as mv
from bench.static import cuda_emulator, triton_interpreter
from mvsplit_ops import _C

GPU = torch.cuda.is_available()
if not GPU:
    triton_interpreter.use()  # Triton's kernels on CPU tensors
    cuda_emulator.install(cuda_emulator.Emulator())  # and CUDA's


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "rotate(name=values): run each backend and each case with every value, "
        "but each pair of backend and case with one value only",
    )


def pytest_generate_tests(metafunc):
    """Run the tests of an OpSuite with each variant as `case`, on each backend.

    A test that asks for `capability` runs on the cpu backend with every instruction set.
    """
    variants = getattr(metafunc.cls, "variants", None)
    if variants is None:
        return
    names, rows = ["backend"], [(backend,) for backend in ("cpu", "triton", "cuda")]
    if "capability" in metafunc.fixturenames:
        names = ["backend", "capability"]
        triton, cuda = ("gpu", "gpu") if GPU else ("interpreted", "emulated")
        rows = [("cpu", name) for name in _C.capabilities()]
        rows += [("triton", triton), ("cuda", cuda)]
    indirect = names.copy()
    if "case" in metafunc.fixturenames:
        pairs = [(i + j, (*row, v)) for i, row in enumerate(rows) for j, v in enumerate(variants)]
        names, indirect = [*names, "case"], [*names, "case"]
        rows = [row for _, row in pairs]
        for marker in metafunc.definition.iter_markers("rotate"):
            ((name, values),) = marker.kwargs.items()
            names.append(name)
            rows = [(*row, values[turn % len(values)]) for turn, row in pairs]
    metafunc.parametrize(names, rows, indirect=indirect, ids=format_id)


def format_id(value):
    """Return the test id of a dtype or a function, and None, pytest's own id, for other values."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None)


@pytest.fixture
def backend(request):
    """Set the backend of every call without one, and create new tensors on its device."""
    device = "cuda" if GPU and request.param != "cpu" else "cpu"
    with mv.use_backend(request.param), torch.device(device):
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def capability(request):
    """Set an instruction set of the cpu backend; for another backend, return only its name."""
    before = _C.capability()
    if request.param in _C.capabilities():
        _C.set_capability(request.param)
    yield request.param
    _C.set_capability(before)


@pytest.fixture
def threads():
    """Return a function that sets the number of CPU threads, which the test's end restores."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
