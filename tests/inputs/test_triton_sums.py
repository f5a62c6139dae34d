"""The Triton kernels where a program adds many tiles, and what their launchers do to inputs."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import mvsplit_ops as mv
from mvsplit_ops import reference
from mvsplit_ops.triton_kernels import _common, _heads, _merge, _segments, swiglu
from tests.inputs.runs import require_all_accurate, run, run_exact_and_eager
from tests.inputs.test_structured_values import (
    STRUCTURES,
    make,
    mvsplit,
    qk_norm,
    residual,
    weighted_mvsplit,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_triton():
    with mv.use_backend("triton"), torch.device(DEVICE):
        yield


@pytest.fixture
def one_program(monkeypatch):
    """Give a program all rows of a segment, as a program has thousands of rows of a large batch."""
    monkeypatch.setattr(_merge, "RESIDENT_PROGRAMS", 1)
    monkeypatch.setattr(_heads, "MOST_PARTIALS", 1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("operator", [weighted_mvsplit, residual])
def test_a_program_of_several_blocks_is_as_accurate_as_eager(one_program, operator, structure):
    """Tiles of two rows: 70 rows are two blocks of 32 tiles."""
    op, *inputs = make(operator, structure, (2, (70, 2), 512), torch.float32, "triton")
    exact, eager = run_exact_and_eager(op, *inputs)
    require_all_accurate(op, run(getattr(mv, op), *inputs), eager, exact)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_program_of_many_tiles_of_heads_is_as_accurate_as_eager(one_program, structure):
    op, *inputs = make(qk_norm, structure, (1, (75, 5), 512), torch.float32, "triton")
    exact, eager = run_exact_and_eager(op, *inputs)
    require_all_accurate(op, run(mv.qk_norm, *inputs), eager, exact)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_mean_of_a_program_of_several_blocks_is_as_accurate_as_eager(one_program, structure):
    _, leaves, _, _ = make(mvsplit, structure, (2, (70, 2), 512), torch.float32, "triton")
    y, jy = mv.mvsplit_rmsnorm_with_mean(**leaves, segments=(70, 2))
    exact, eager = (reference.segment_means(t, (70, 2)) for t in (y.double(), y))
    require_all_accurate("jy", {"jy": jy}, {"jy": eager}, {"jy": exact})


@pytest.mark.parametrize("rows", [0, 1, 128, 129, 5000])
def test_partial_rows_are_added_exactly(rows):
    """In float64, and rounded once, whatever the signs and magnitudes."""
    partials = torch.randn(2, rows, 19) * 10.0 ** torch.randint(-8, 8, (2, rows, 19))
    sums = torch.stack(_common.sum_rows(partials))
    exact = partials.double().sum(1)
    assert torch.allclose(sums.double(), exact, rtol=2**-23, atol=0)


def test_an_infinite_partial_sum_gives_infinity_and_not_nan():
    partials = torch.ones(1, 40, 3)
    partials[0, 7, 1], partials[0, 9, 2] = torch.inf, torch.nan
    (sums,) = _common.sum_rows(partials)
    assert sums[0] == 40 and sums[1] == torch.inf and sums[2].isnan()


@triton.jit
def _store_tokens(out, block, ends, share):
    segment, begin, end = _segments.block_tokens(block, ends, share)
    tl.store(out, segment)
    tl.store(out + 1, begin)
    tl.store(out + 2, end)


@pytest.mark.parametrize("T", [100, 2**30 - 1, 2**32, 2**40])
def test_blocks_begin_where_they_should_in_segments_of_any_length(T):
    segments, share = (T - 10, 10), 7
    blocks = -(-(T - 10) // share)
    out = torch.empty(3, dtype=torch.int64)
    for block in (0, blocks - 1, blocks, blocks + 1):
        _store_tokens[(1,)](out, block, _segments.encode_ends(segments), share)
        segment = int(block >= blocks)
        begin = T - 10 + (block - blocks) * share if segment else block * share
        assert out.tolist() == [segment, begin, min(begin + share, T if segment else T - 10)]


class Operations(TorchDispatchMode):
    """Record the names of the PyTorch operations that run in the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operations(monkeypatch):
    """Do not launch; return a context that records PyTorch's operations."""
    for module in (_heads, swiglu):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    return Operations()


def strided_tables(dtype):
    t = torch.empty(3, 9, 4, 2, dtype=dtype)
    yield t[0, ..., 0], t[0, ..., 1]
    yield t[..., 0], t[..., 1]
    yield t[:1, ..., 0], t[:1, ..., 0]
    yield t[0, :1, :, 0].expand(9, 4), t[0, ..., 0]
    yield t[..., 0].transpose(1, 2)[:, :, :4].transpose(1, 2), t[:, :4, :, 1]


TABLES = [
    pytest.param(tables, id=f"{dtype}-{i}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for i, tables in enumerate(strided_tables(dtype))
]


@pytest.mark.parametrize("tables", TABLES)
def test_tables_are_read_in_place(operations, tables):
    x = torch.empty(3, 4, 2, 8)
    with operations:
        _heads.LAUNCHERS.rope_fwd(x, *tables, False, False)
        _heads.LAUNCHERS.rope_qk_norm_fwd(x, x, *tables, None, None, 1e-6, False, False, False)
    assert operations.names == {"aten::empty.memory_format"}


PACKED = torch.empty(3, 4, 40)[..., 1:37]


@pytest.mark.parametrize(
    ("gate", "up"),
    [(PACKED, None), (PACKED[..., 5:9], PACKED[..., 20:24]), (PACKED[:, :1], PACKED[:, 3:])],
    ids=["packed", "columns", "rows"],
)
def test_gate_and_up_are_read_in_place(operations, gate, up):
    dy = PACKED[..., 2:20] if up is None else gate
    with operations:
        swiglu.swiglu_fwd(gate, up, True)
        swiglu.swiglu_bwd(dy, gate, up, True)
    assert operations.names == {"aten::empty.memory_format"}


def test_the_gradient_of_up_is_finite_where_silu_vanishes():
    """dy * gate overflows; dy * (gate * sigmoid(gate)) does not."""
    gate = torch.tensor([-1e30, -300.0, 1e30], requires_grad=True)
    up = torch.ones(3, requires_grad=True)
    dy = torch.tensor([1e10, 1e38, 1e5])
    _, dup = torch.autograd.grad(mv.swiglu(gate, up), (gate, up), dy)
    assert dup[0] == 0 and dup[1] == 0 and torch.allclose(dup[2], torch.tensor(1e35))


def test_float32_silu_is_accurate_where_it_is_small():
    """exp(-gate) has a relative error of a few units in the last place, however large it is."""
    gate = -torch.linspace(1, 87, 173)
    got = mv.swiglu(gate, torch.ones_like(gate))
    exact = gate.double() * gate.double().sigmoid()
    assert ((got.double() - exact) / exact).abs().max() <= 8 * 2**-24


def test_silu_of_every_sign_and_size_follows_eager_code():
    gate = torch.tensor([-torch.inf, -3e38, -104.0, -88.5, 0.0, 104.0, 3e38, torch.inf, torch.nan])
    got = mv.swiglu(gate, torch.ones_like(gate))
    assert torch.allclose(got, torch.nn.functional.silu(gate), rtol=1e-6, atol=0, equal_nan=True)
