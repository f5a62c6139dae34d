"""Settings of the heap of glibc; other C libraries are left as they are."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Reuse freed memory instead of returning it to the system.

    A training process soon has its final size. A short benchmark that repeatedly allocates and
    frees a few megabytes would measure page faults instead: up to half of the time of a call.
    """
    _mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum of glibc
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def return_freed_memory() -> None:
    """Map every tensor of 128 KiB or more separately, and unmap it when it is freed.

    Otherwise small gradients that outlive a recomputed block pin the pages of the heap: 400 blocks
    of width 64, three of four recomputed, needed 50 % more memory. This costs some time.
    """
    _mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def _mallopt(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
