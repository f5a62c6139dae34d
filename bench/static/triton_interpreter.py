"""Triton's interpreter, which runs kernels on CPU tensors: switch, corrections, byte counts."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench.static.byte_counter import ByteCounter


def use() -> None:
    """Make Triton interpret its kernels in this process; call before anything imports Triton.

    RuntimeError: Triton was already imported to compile its kernels.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton was imported to compile its kernels; "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    _round_to_nearest()
    _keep_masks_boolean()


def _round_to_nearest() -> None:
    """Make the interpreter round float32 to bfloat16 to nearest even, as a GPU does.

    It truncates: up to twice the error of a GPU, and always towards zero. Its own conversions
    between the two also take most of its time.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl
    if convert.__module__ == __name__:  # already replaced
        return

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        dtypes = src.dtype.scalar, dst_type.scalar
        if dtypes == (tl.float32, tl.bfloat16):
            values = torch.tensor(src.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(values.view("uint16"), tl.bfloat16)
        if dtypes == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype("uint32") << 16).view("float32"), tl.float32)
        return convert(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast


def _keep_masks_boolean() -> None:
    """Keep a scalar condition boolean when it is combined with a mask.

    Triton 3.9's interpreter converts it to integers, and its loads then refuse the mask. Compiled
    kernels are not affected.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat
    if splat.__module__ == __name__:  # already replaced
        return

    def create_splat(self: Any, dtype: Any, scalar: Any) -> Any:
        block = splat(self, dtype, scalar)
        if scalar.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    InterpreterBuilder.create_splat = create_splat


@contextlib.contextmanager
def count_bytes(counter: ByteCounter) -> Iterator[ByteCounter]:
    """Add the bytes that interpreted kernels load and store in the block to `counter`."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, atomic, run = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        executor.__call__,
    )

    def accessed_bytes(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(pointers: Any, mask: Any, *args: Any) -> Any:
        counter.read += accessed_bytes(pointers, mask)
        return load(pointers, mask, *args)

    def counted_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        counter.written += accessed_bytes(pointers, mask)
        return store(pointers, value, mask, *args)

    def counted_atomic(kind: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        counter.read += accessed_bytes(pointers, mask)
        counter.written += accessed_bytes(pointers, mask)
        return atomic(kind, pointers, value, mask, *args)

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.count_launch(args, kwargs)
        with _disable_current_modes():  # the PyTorch operations of the interpreter itself
            return run(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, executor.__call__ = counted_atomic, counted_run
    try:
        yield counter
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        executor.__call__ = run
