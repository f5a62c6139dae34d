"""What glibc's heap does with freed memory; nothing happens with another C library."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory():
    """Have it reuse freed memory instead of returning it to the system.

    A training process has long grown to its size. A short benchmark that allocates and frees a few
    megabytes at a time would measure page faults: up to half of a call's time, whoever makes it.
    """
    _mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def return_freed_memory():
    """Have it map every tensor of 128 KiB or more on its own, and unmap it when it is freed.

    Small gradients that outlive a recomputed block pin the heap's pages: 400 blocks of width 64
    with three of four recomputed took half as much memory again. Costs some time.
    """
    _mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def _mallopt(parameter, value):
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
