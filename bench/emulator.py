"""tests/simt, which runs CUDA kernels on CPU tensors: brought in from the checkout, counted."""

import contextlib
import importlib
import sys
from pathlib import Path


def simt():
    """The module tests/simt. It is a test tool and no package of its own."""
    folder = str(Path(__file__).parent.parent / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("simt")


@contextlib.contextmanager
def counting(traffic):
    """Within the block CPU tensors take backend "cuda"; its bytes are added to `traffic`.

    traffic.read and .written in bytes, .launches.
    """
    with simt().using() as emulator:
        emulator.traffic = traffic
        yield traffic
