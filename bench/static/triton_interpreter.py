"""Triton's interpreter, which runs kernels on CPU tensors: switch, corrections, byte counts."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
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
    _correct_interpreter()


def _correct_interpreter() -> None:
    """Replace methods of Triton's interpreter that differ from compiled kernels, once.

    cast_impl     truncates float32 to bfloat16, with up to twice the error of a GPU and always
                  towards zero: the replacement rounds to nearest even. It is also faster, since the
                  original's conversions between the two take most of the interpreter's time.
    create_splat  of Triton 3.9 converts a scalar condition to integers when it is combined with a
                  mask, and loads then refuse the mask: the replacement keeps it boolean.
    sum           adds the rows of a tile one after another: the replacement adds them as a tree,
                  as threads and warps of a GPU do.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    convert, splat = InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat
    add_in_order = ReduceOps.sum
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

    def create_splat(self: Any, dtype: Any, scalar: Any) -> Any:
        block = splat(self, dtype, scalar)
        if scalar.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    def sum_as_tree(self: Any, tile: Any) -> Any:
        if self.axis is None:
            return add_in_order(self, tile)
        data = tile.handle.data
        while data.shape[self.axis] > 1:  # sizes of tiles are powers of two
            first, second = np.split(data, 2, self.axis)
            data = first + second
        return self.to_tensor(data if self.keep_dims else data.squeeze(self.axis), tile.dtype)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat = cast, create_splat
    ReduceOps.sum = sum_as_tree
    _patch_language_once()


def _patch_language_once() -> None:
    """Let a launch patch triton.language once per module that has functions of the kernel.

    The interpreter does so at each call of such a function, which takes half of its time.
    """
    from triton.runtime import interpreter

    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_once


@contextlib.contextmanager
def count_bytes(counter: ByteCounter) -> Iterator[ByteCounter]:
    """Add the bytes that interpreted kernels load and store in the block to `counter`."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, run = builder.create_atomic_rmw, executor.__call__

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
