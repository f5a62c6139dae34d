"""Triton's interpreter, which runs kernels on CPU tensors: switched on, true to a GPU, counted."""

import contextlib
import os
import sys

import torch
from torch.utils._python_dispatch import _disable_current_modes


def use():
    """Have Triton interpret its kernels in this process: before anything has imported Triton.

    RuntimeError: Triton is imported already, to compile its kernels.
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


def _round_to_nearest():
    """float32 to bfloat16 to nearest even, as on a GPU.

    The interpreter cuts the lower bits off: twice a GPU's error, and always towards zero. The way
    there and back is also most of its time.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl
    if getattr(convert, "to_nearest", False):
        return

    def cast(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            values = torch.tensor(src.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(values.view("uint16"), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype("uint32") << 16).view("float32"), tl.float32)
        return convert(self, src, dst_type)

    cast.to_nearest = True
    InterpreterBuilder.cast_impl = cast


def _keep_masks_boolean():
    """Triton 3.9's interpreter makes integers of a scalar condition that joins a mask.

    Its loads then refuse the mask; compiled kernels are not concerned.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat
    if getattr(splat, "keeps_bool", False):
        return

    def create_splat(self, kind, scalar):
        block = splat(self, kind, scalar)
        if scalar.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    create_splat.keeps_bool = True
    InterpreterBuilder.create_splat = create_splat


@contextlib.contextmanager
def counting(traffic):
    """Within the block, the bytes that interpreted kernels load and store are added to `traffic`.

    traffic.read and .written in bytes, .launches.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, atomic, run = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
        executor.__call__,
    )

    def bytes_of(pointers, mask):
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(pointers, mask, *args):
        traffic.read += bytes_of(pointers, mask)
        return load(pointers, mask, *args)

    def counted_store(pointers, value, mask, *args):
        traffic.written += bytes_of(pointers, mask)
        return store(pointers, value, mask, *args)

    def counted_atomic(kind, pointers, value, mask, *args):
        traffic.read += bytes_of(pointers, mask)
        traffic.written += bytes_of(pointers, mask)
        return atomic(kind, pointers, value, mask, *args)

    def counted_run(self, *args, **kwargs):
        traffic.launched(args, kwargs)
        with _disable_current_modes():  # the interpreter's own PyTorch operations
            return run(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, executor.__call__ = counted_atomic, counted_run
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        executor.__call__ = run
