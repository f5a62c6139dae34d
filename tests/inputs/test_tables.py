"""Rotary tables in the forms in which other libraries keep them."""

import functools
import gc
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import mvsplit_ops as mv
from bench.common.accuracy import require_accurate
from mvsplit_ops import _tables
from tests.op_suite import assert_equal

B, T, H, DH = 2, 7, 3, 8
HALF = DH // 2
BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
BOTH_MODES = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
HALF_WIDTH = "(7, 4), (1, 7, 4) or (2, 7, 4), or of width 8"


def angles(*shape):
    """Return angles (.., HALF), different for each element."""
    count = torch.Size(shape).numel() * HALF
    return torch.arange(count, dtype=torch.float64).square().reshape(*shape, HALF) * 0.1


def in_pairs(t):
    return t.repeat_interleave(2, -1)


def in_halves(t):
    return torch.cat((t, t), -1)


def every_second(t):
    """Return t with a stride of 2 in its last dimension, in memory whose gaps are NaN."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


def columns_of_wider(t):
    return torch.cat((t, torch.full_like(t, torch.nan)), -1)[..., : t.shape[-1]]


def transposed(t):
    return t.mT.contiguous().mT


FORMS = {
    "(T, Dh/2)": lambda c, s: (c, s),
    "(1, T, Dh/2)": lambda c, s: (c[None], s[None]),
    "(B, T, Dh/2) expanded": lambda c, s: (c.expand(B, -1, -1), s.expand(B, -1, -1)),
    "(T, Dh) in halves": lambda c, s: (in_halves(c), in_halves(s)),
    "(T, Dh) in pairs": lambda c, s: (in_pairs(c), in_pairs(s)),
    "(1, T, Dh) in halves": lambda c, s: (in_halves(c)[None], in_halves(s)[None]),
    "(1, T, Dh) in pairs": lambda c, s: (in_pairs(c)[None], in_pairs(s)[None]),
    "(B, T, Dh) in halves": lambda c, s: (
        in_halves(c).expand(B, -1, -1),
        in_halves(s).expand(B, -1, -1),
    ),
    "complex (T, Dh/2)": lambda c, s: (torch.complex(c, s),),
    "complex (1, T, Dh/2)": lambda c, s: (torch.complex(c, s)[None],),
    "complex conjugated twice": lambda c, s: (torch.complex(c, -s).conj(),),
    "complex, as real and imaginary part": lambda c, s: (
        torch.complex(c, s).real,
        torch.complex(c, s).imag,
    ),
    "strides of 2": lambda c, s: (every_second(c), every_second(s)),
    "columns of a wider table": lambda c, s: (columns_of_wider(c), columns_of_wider(s)),
    "transposed": lambda c, s: (transposed(c), transposed(s)),
    "different strides": lambda c, s: (c, every_second(s)),
    "strides of 2 by sample": lambda c, s: (every_second(c)[None], transposed(s)[None]),
    "longer than T": lambda c, s: (
        torch.cat((c, torch.full_like(c, torch.nan))),
        torch.cat((s, torch.full_like(s, torch.nan))),
    ),
    "one expanded row": lambda c, s: (c[:1].expand(T, -1), s[:1].expand(T, -1)),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
@ON_BACKENDS
@BOTH_MODES
def test_every_form_of_a_table_rotates_by_the_same_angles(form, backend, interleaved):
    angle = angles(T) if form != "one expanded row" else angles(T)[:1].expand(T, -1)
    cos, sin = angle.cos(), angle.sin()
    x = torch.randn(B, T, H, DH, dtype=torch.float64)
    tables = FORMS[form](cos, sin)
    dy = torch.randn_like(x)
    for conjugate in (False, True):
        options = {"interleaved": interleaved, "conjugate": conjugate}
        exact = mv.reference.rope(x, cos.contiguous(), sin.contiguous(), **options)
        leaf = x.clone().requires_grad_()
        y = mv.rope(leaf, *tables, **options)
        assert torch.allclose(y, exact, rtol=1e-12, atol=1e-12)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        wanted = mv.reference.rope(
            dy, cos.contiguous(), sin.contiguous(), interleaved=interleaved, conjugate=not conjugate
        )
        assert torch.allclose(dx, wanted, rtol=1e-12, atol=1e-12)
    q, k = mv.rope_qk_norm(x, x[:, :, :1], *tables, interleaved=interleaved)
    rotated = mv.reference.rope(x, cos.contiguous(), sin.contiguous(), interleaved=interleaved)
    expected = mv.reference.qk_norm(rotated, rotated[:, :, :1])
    for a, e in zip((q, k), expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", DTYPES, ids=str)
@ON_BACKENDS
def test_tables_of_any_dtype_are_read_in_the_dtype_of_arithmetic(dtype, activations, backend):
    """A table is not rounded to the dtype of x; the values that it has are used."""
    angle = angles(T)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(B, T, H, DH).to(activations)
    for tables in ((cos, sin), (every_second(cos), every_second(sin))):
        exact = mv.reference.rope(x.double(), cos.double(), sin.double())
        eager = mv.reference.rope(x, cos, sin)
        got = mv.rope(x, *tables)
        assert got.dtype == activations
        require_accurate(f"{dtype} tables", got, eager, exact)


@ON_BACKENDS
def test_a_table_of_each_sample(backend):
    angle = angles(B, T)
    x = torch.randn(B, T, H, DH, dtype=torch.float64)
    whole = mv.rope(x, torch.polar(torch.ones_like(angle), angle))
    for b in range(B):
        one = mv.rope(x[b : b + 1], angle[b].cos(), angle[b].sin())
        assert torch.allclose(whole[b : b + 1], one, rtol=1e-12, atol=1e-12)


COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.copy_)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"], indirect=True)
def test_tables_are_read_in_place(backend):
    """No form makes a contiguous or converted copy in a call."""
    x, angle = torch.randn(B, T, H, DH), angles(T).float()
    copies = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (
                torch.ops.aten._to_copy,
                torch.ops.aten.clone,
                torch.ops.aten.copy_,
            ):
                copies.append(func)
            return func(*args, **(kwargs or {}))

    for tables in (
        (angle.cos().double(), angle.sin().double()),
        (every_second(angle.cos()), every_second(angle.sin())),
        (torch.polar(torch.ones_like(angle), angle),),
        (in_halves(angle.cos()), in_halves(angle.sin())),
        (angle.cos()[None].half(), angle.sin()[None].half()),
    ):
        mv.rope(x, *tables)  # compiles, and checks the values of a table of full width
        with Watch():
            mv.rope(x, *tables)
    assert not copies


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_tables_are_refused(backend):
    x, c = torch.randn(B, T, H, DH), torch.rand(T, HALF)
    full = torch.rand(T, DH)
    refused = (
        ((c[:-1], c[:-1]), f"cos must be at least {T} rows long"),
        ((c[..., :3], c[..., :3]), f"cos must be {HALF_WIDTH}"),
        ((c.expand(3, -1, -1), c.expand(3, -1, -1)), f"cos must be {HALF_WIDTH}"),
        ((c[None, None], c[None, None]), f"cos must be {HALF_WIDTH}"),
        ((c[0], c[0]), f"cos must be {HALF_WIDTH}"),
        ((c.long(), c.long()), f"cos must be {HALF_WIDTH}"),
        ((c, c.double()), "sin must be float32 like cos"),
        ((c, c[None]), f"sin must be of the shape of cos, ({T}, {HALF})"),
        ((c,), "sin must be a tensor, or None if cos is complex"),
        ((c, None), "sin must be a tensor, or None if cos is complex"),
        ((torch.complex(c, c), c), "sin must be None if cos is complex"),
        ((torch.complex(c, c)[..., :3],), f"cos must be {HALF_WIDTH}"),
        ((full, full), "cos of width Dh must repeat each angle, in two equal halves or in pairs"),
        ((in_halves(c), full), "sin of width Dh must repeat each angle"),
        ((in_halves(c), c), "cos must be"),
        ((None, None), "sin must be a tensor"),
    )
    for tables, message in refused:
        for call in (
            lambda tables=tables: mv.rope(x, *tables, backend=backend),
            lambda tables=tables: mv.rope_qk_norm(x, x, *tables, backend=backend),
        ):
            with pytest.raises(ValueError, match=re.escape(message)) as error:
                call()
            assert str(error.value).startswith(("rope: ", "rope_qk_norm: "))


@BOTH_MODES
def test_a_table_that_changes_is_checked_again(interleaved):
    x, angle = torch.randn(B, T, H, DH), angles(T).float()
    repeat, other = (in_pairs, in_halves) if interleaved else (in_halves, in_pairs)
    cos, sin = repeat(angle.cos()), repeat(angle.sin())
    expected = mv.rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    assert_equal([mv.rope(x, cos, sin, interleaved=interleaved)] * 2, [expected] * 2)
    cos.copy_(other(angle.cos()))
    sin.copy_(other(angle.sin()))
    assert torch.equal(mv.rope(x, cos, sin, interleaved=interleaved), expected)
    cos[0, 0] += 1
    with pytest.raises(ValueError, match="cos of width Dh must repeat"):
        mv.rope(x, cos, sin, interleaved=interleaved)
    with torch.inference_mode():  # whose tensors do not count their changes
        frozen = repeat(angle.cos()), repeat(angle.sin())
        assert torch.equal(mv.rope(x, *frozen, interleaved=interleaved), expected)
        frozen[0][0, 0] += 1
        with pytest.raises(ValueError, match="cos of width Dh must repeat"):
            mv.rope(x, *frozen, interleaved=interleaved)


@BOTH_MODES
@pytest.mark.parametrize("compiled", [False, True])
def test_one_layout_fits_both_tables(interleaved, compiled):
    """cos fits both layouts, with different angles; sin fits one of them, which decides."""
    torch.compiler.reset()
    x = torch.randn(1, 1, 1, DH)
    cos = torch.tensor([[0.5, 0.5, 0.8, 0.8, 0.5, 0.5, 0.8, 0.8]])
    sin = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    rotate = functools.partial(mv.rope, interleaved=interleaved)
    run = torch.compile(rotate, fullgraph=True, backend="aot_eager") if compiled else rotate
    for repeat, angles_of_cos in ((in_halves, cos[:, :HALF]), (in_pairs, cos[:, ::2])):
        expected = rotate(x, angles_of_cos, sin)
        assert torch.equal(run(x, cos, repeat(sin)), expected)


def test_answers_about_tables_do_not_outlive_them():
    gc.collect()
    before = len(_tables._answers)
    table = in_halves(angles(T).float())
    mv.rope(torch.randn(B, T, H, DH), table.cos(), table.sin())
    views = in_halves(angles(64).float())
    for n in range(T, 40):  # slices of one table share an entry
        mv.rope(torch.randn(1, n, 1, DH), views[:n].cos(), views[:n].sin())
        mv.rope(torch.randn(1, n, 1, DH), views[:n], views[:n])
    assert len(_tables._answers) <= before + 1
    del table, views
    gc.collect()
    assert len(_tables._answers) == before


@BOTH_MODES
@pytest.mark.parametrize("repeat", [in_halves, in_pairs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_code_checks_full_width_tables_in_the_graph(interleaved, repeat, backend):
    torch.compiler.reset()
    x, angle = torch.randn(B, T, H, DH), angles(T).float()
    cos, sin = repeat(angle.cos()), repeat(angle.sin())

    def rotate(x, cos, sin):
        return mv.rope(x, cos, sin, interleaved=interleaved, backend=backend)

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    expected = mv.rope(x, angle.cos(), angle.sin(), interleaved=interleaved, backend=backend)
    assert torch.allclose(compiled(x, cos, sin), expected, rtol=1e-6, atol=1e-6)
    cos[0, 0] += 1
    with pytest.raises(RuntimeError, match="cos of width Dh must repeat"):
        compiled(x, cos, sin)


@pytest.mark.parametrize("repeat", [in_halves, in_pairs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_transforms_over_full_width_tables(repeat, backend):
    x, angle = torch.randn(3, B, T, H, DH), angles(3, T).float()
    cos, sin = repeat(angle.cos()), repeat(angle.sin())

    def rotate(x, cos, sin):
        return mv.rope(x, cos, sin, backend=backend)

    expected = torch.stack([rotate(x[i], angle[i].cos(), angle[i].sin()) for i in range(3)])
    assert torch.allclose(torch.func.vmap(rotate)(x, cos, sin), expected, atol=1e-6)
    cos[1, 0, 0] += 1  # vmap cannot raise an error about values
    assert torch.func.vmap(rotate)(x, cos, sin).isnan()[1].any()
    traced = make_fx(rotate)(x[0], cos[0], sin[0])
    assert torch.allclose(traced(x[2], cos[2], sin[2]), expected[2], atol=1e-6)
