"""Shared fixtures. Test modules import op_suite from this folder and bench from the checkout."""

import pytest
import torch

from mvsplit_ops import _C


def pytest_generate_tests(metafunc):
    """An OpSuite's `case` is each of its variants in turn."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.cls, "variants"):
        metafunc.parametrize("case", list(metafunc.cls.variants), indirect=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=_C.capabilities())
def capability(request):
    """Each instruction set that this processor runs, in turn."""
    before = _C.capability()
    _C.set_capability(request.param)
    yield request.param
    _C.set_capability(before)


@pytest.fixture
def threads():
    """Sets the number of CPU threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
