"""Every implementation of an operator: its adapter is accurate, its absence has a reason."""

import importlib.metadata
import sys
import textwrap
import types

import pytest
import torch

from bench.cases import CASES, Shape
from bench.common.accuracy import Inaccurate, require_case
from bench.measure import implementations
from bench.static import traffic, triton_interpreter
from bench.static.byte_counter import ByteCounter

BY_NAME = {case.op: case for case in CASES}
SMALL = Shape(B=2, segments=(5, 3), D=32, H=2, F=24, dtype=torch.float32)

# Stand-ins in float64 with the interface, the layout and the sign of the real operators.
ROTATE = """
    def rotate(x, cos, sin):
        x1, x2 = x.double().chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)

    def norm(x, eps):
        wide = x.double()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
"""

PUBLISHED = {
    "_common.py": "import torch" + ROTATE,
    "rope.py": """
    from kernels._common import rotate

    def fast_rope_embedding(Q, K, cos, sin):
        return rotate(Q, cos, -sin).contiguous(), rotate(K, cos, -sin).contiguous()
    """,
    "rmsnorm.py": """
    from kernels._common import norm

    def fused_qk_norm(q, k, eps=1e-6):
        assert q.is_contiguous() and k.is_contiguous()
        return norm(q, eps), norm(k, eps)
    """,
    "swiglu.py": """
    import torch

    def fast_swiglu_packed(x):
        gate, value = x.double().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * value).to(x.dtype)
    """,
    "fused_mvsplit_rmsnorm.py": """
    import torch
    from kernels._common import norm

    def fused_mvsplit_rmsnorm(x, u, alpha, beta, eps, L_img):
        parts = []
        for a, b in ((x[:, :L_img], u[:, :L_img]), (x[:, L_img:], u[:, L_img:])):
            if a.shape[1]:
                a, b = a.double(), b.double()
                ma, mb = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
                parts.append(a + beta * (b - mb) + alpha * (mb - ma))
        return norm(torch.cat(parts, 1), eps).to(x.dtype)
    """,
}

LIGER = """
    class LigerRopeFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
            assert rotary_dim == q.shape[-1] == 2 * cos.shape[-1]
            ctx.save_for_backward(cos, sin)
            for t in (q, k):
                assert t.transpose(1, 2).is_contiguous()
                t.copy_(rotate(t, cos, sin))
            return q.view_as(q), k.view_as(k)

        @staticmethod
        def backward(ctx, dq, dk):
            cos, sin = ctx.saved_tensors
            return rotate(dq, cos, -sin), rotate(dk, cos, -sin), *[None] * 5

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            return norm(X, eps)

    class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, in_place=False):
            ctx.save_for_backward(y)
            gate, value = y.double().chunk(2, -1)
            return (torch.nn.functional.silu(gate) * value).to(y.dtype)

        @staticmethod
        def backward(ctx, dc):
            gate, value = (t.double() for t in ctx.saved_tensors[0].flatten(0, -2).chunk(2, -1))
            dc, sigmoid = dc.double().flatten(0, -2), gate.sigmoid()
            dgate = dc * value * sigmoid * (1 + gate * (1 - sigmoid))
            return torch.cat((dgate, dc * gate * sigmoid), -1).float(), None
"""

QUACK = """
    def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None,
                eps=1e-6, prenorm=False, weight_offset=0.0):
        return norm(x, eps)
"""

QUACK_ROTARY = """
    from quack import rotate

    def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False):
        return rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)
"""


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        head, _, body = text.partition("\n")
        path.write_text(head + "\n" + textwrap.dedent(body))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    files = {f"kernels/{name}": text for name, text in PUBLISHED.items()}
    return write(tmp_path_factory.mktemp("published"), files)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make both packages importable; yield their versions, which a test may change."""
    write(
        tmp_path,
        {
            "liger_kernel/__init__.py": "",
            "liger_kernel/ops/__init__.py": "import torch\n" + ROTATE + LIGER,
            "quack/__init__.py": "import torch\n" + ROTATE + QUACK,
            "quack/rotary.py": QUACK_ROTARY,
        },
    )
    monkeypatch.syspath_prepend(tmp_path)
    versions = {package: oldest for package, oldest in implementations.PACKAGES.values()}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    packages = "liger_kernel", "quack"
    others = {n: m for n, m in sys.modules.items() if n.split(".")[0] in packages}
    for name in others:
        del sys.modules[name]
    yield versions
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]
    sys.modules.update(others)


OFFERED = [(name, op) for name, ops in implementations.PEERS.items() for op in ops]


@pytest.mark.parametrize("name, op", OFFERED)
def test_an_adapter_is_accurate_and_does_not_change_its_inputs(name, op, published, installed):
    case = BY_NAME[op]
    inputs = case.example(SMALL)
    function = implementations.load_function(name, case, "cpu", published)
    require_case(case, name, function, inputs)
    for t, original in zip(inputs[0] + inputs[1], sum(case.example(SMALL)[:2], ()), strict=True):
        assert torch.equal(t, original)


def test_a_wrong_peer_is_inaccurate(installed, monkeypatch):
    import liger_kernel.ops as ops

    monkeypatch.setattr(ops, "rotate", lambda x, cos, sin: x.clone())
    case = BY_NAME["rope"]
    with pytest.raises(Inaccurate, match="rope, liger, result 0"):
        require_case(
            case, "liger", implementations.load_function("liger", case, "cpu"), case.example(SMALL)
        )


@pytest.mark.parametrize("name", ["eager", "compile", "cpu"])
def test_cpu_implementations_are_not_missing_on_a_cpu(name):
    for case in CASES:
        assert implementations.missing_reason(name, case, "cpu") is None
    case = BY_NAME["swiglu"]
    require_case(case, name, implementations.load_function(name, case, "cpu"), case.example(SMALL))


@pytest.mark.parametrize("name", implementations.NEED_CUDA)
def test_gpu_implementations_are_missing_on_a_cpu(name, published):
    reason = implementations.missing_reason(name, BY_NAME["rope"], "cpu", published)
    assert reason == "it needs a CUDA device: on cpu there is nothing to time"


def test_the_cpu_backend_is_missing_on_a_gpu():
    assert "cpu" in implementations.missing_reason(
        "cpu", BY_NAME["mvsplit_rmsnorm_with_mean"], "cuda"
    )


@pytest.mark.parametrize("name, op", OFFERED)
def test_an_installed_peer_is_not_missing_on_a_gpu(name, op, published, installed):
    assert implementations.missing_reason(name, BY_NAME[op], "cuda:0", published) is None


@pytest.mark.parametrize("name", implementations.PACKAGES)
def test_the_reason_for_an_absent_or_old_package_has_the_remedy(name, installed):
    package, oldest = implementations.PACKAGES[name]
    installed[package] = "0.0.9"
    remedy = f"run pip install '{package}>={oldest}'"
    case = BY_NAME["rope"]
    assert (
        implementations.missing_reason(name, case, "cuda")
        == f"{package} 0.0.9 is older than {oldest}; {remedy}"
    )
    del installed[package]
    assert (
        implementations.missing_reason(name, case, "cuda")
        == f"{package} is not installed; {remedy}"
    )
    with pytest.raises(RuntimeError, match="'.*' cannot run on cuda: .* is not installed"):
        implementations.load_function(name, case, "cuda")


def test_a_package_that_cannot_be_imported_is_missing(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "quack", None)
    reason = implementations.missing_reason("quack", BY_NAME["qk_norm"], "cuda")
    assert reason.startswith("it cannot be imported (ModuleNotFoundError: ")
    assert reason.endswith("run pip install 'quack-kernels>=0.6.5'")


def test_operators_that_a_library_lacks_are_missing_on_every_device(published):
    swiglu, residual = BY_NAME["swiglu"], BY_NAME["residual_rmsnorm"]
    assert "epilogue" in implementations.missing_reason("quack", swiglu, "cuda")
    assert "no scale" in implementations.missing_reason("liger", residual, "cpu")
    assert (
        implementations.missing_reason("published", residual, "cuda", published)
        == "it has no LayerScale + RMSNorm"
    )
    with pytest.raises(RuntimeError, match="residual_rmsnorm: 'quack' cannot run on cpu"):
        implementations.load_function("quack", residual, "cpu")


def test_the_published_merge_takes_one_or_two_segments(published):
    case = BY_NAME["mvsplit_rmsnorm"]
    reason = "its MV-Split takes one or two segments, not 3"
    assert (
        implementations.missing_reason("published", case, "cuda", published, segments=(1, 2, 3))
        == reason
    )
    function = implementations.load_function("published", case, "cpu", published)
    with pytest.raises(ValueError, match="published: " + reason):
        function(*case.example(Shape(B=1, segments=(2, 3, 1), D=8)))
    one = Shape(B=2, segments=(6,), D=16, dtype=torch.float32)
    require_case(case, "published", function, case.example(one))


def test_the_reason_for_a_wrong_checkout_names_the_expected_file(tmp_path):
    write(tmp_path, {"kernels/_common.py": ""})
    case = BY_NAME["swiglu"]
    assert "expected kernels/rope.py in it" in implementations.missing_reason(
        "published", case, "cuda", tmp_path
    )
    assert "pass its folder with --published" in implementations.missing_reason(
        "published", case, "cuda"
    )
    with pytest.raises(RuntimeError, match="is not a checkout of erwold/mv-split"):
        traffic.measure(SMALL, cases=[case], published=tmp_path)


def test_loading_a_checkout_does_not_change_sys_modules(published, monkeypatch):
    implementations._published_module.cache_clear()
    installed = {name: types.ModuleType(name) for name in ("kernels", "kernels.layer")}
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = list(sys.path)
    implementations.load_function("published", BY_NAME["rope_qk_norm"], "cpu", published)
    kernels = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "kernels"}
    assert kernels == installed and sys.path == path


def test_the_error_for_an_unknown_name_lists_the_implementations():
    with pytest.raises(ValueError, match="eager, compile, cpu, triton, cuda, liger, quack, publ"):
        implementations.missing_reason("fused", BY_NAME["rope"], "cpu")
    with pytest.raises(ValueError, match="got 'apex'"):
        implementations.load_function("apex", BY_NAME["rope"], "cpu")


COPIES = """
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def copy(source, target, rows, stride, D: tl.constexpr):
        row, cols = tl.program_id(0), tl.arange(0, 32)
        here = (cols < D) & (row < rows)  # a mask with a scalar part
        tl.store(target + row * D + cols, tl.load(source + row * stride + cols, here), here)

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            B, T, F2 = x.shape
            y = x.new_empty(B, T, F2 // 2)
            copy[(B * T,)](x, y, B * T, F2, F2 // 2)
            return y

        @staticmethod
        def backward(ctx, dy):
            half = torch.empty_like(dy)
            copy[(dy.shape[0] * dy.shape[1],)](dy, half, 10**6, dy.shape[2], dy.shape[2])
            return torch.cat((half, half), -1)

    fast_swiglu_packed = Gate.apply
"""


def test_published_kernels_and_their_pytorch_operations_are_counted(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("Triton compiles in this process")
    triton_interpreter.use()
    files = {**PUBLISHED, "swiglu.py": COPIES}
    write(tmp_path, {f"kernels/{name}": text for name, text in files.items()})
    cases = [BY_NAME["swiglu"], BY_NAME["residual_rmsnorm"]]
    steps = []
    counted = traffic.measure(SMALL, lambda *step: steps.append(step), cases, tmp_path)
    assert len(steps) == steps[0][1] == 9
    rows = [row for row in counted.rows if row.backend == "published"]
    assert [(row.op, row.direction) for row in rows] == [("swiglu", "fwd"), ("swiglu", "bwd")]
    n = SMALL.B * SMALL.T * SMALL.F * 4
    got = traffic.count(cases[0], "published", cases[0].example(SMALL), tmp_path)
    assert got["fwd"] == ByteCounter(read=n, written=n, launches=1, tensors=3 * n)
    assert got["bwd"] == ByteCounter(read=3 * n, written=3 * n, launches=2, tensors=5 * n)
    assert rows[0].read == n / SMALL.pass_bytes and rows[1].launches == 2


def test_negated_tables_are_made_once_and_not_counted(published):
    case, inputs = BY_NAME["rope"], BY_NAME["rope"].example(SMALL)
    first, again = (traffic.count(case, "published", inputs, published) for _ in range(2))
    assert first == again
    sin = inputs[1][1]
    assert implementations._negated(sin) is implementations._negated(sin)
    assert torch.equal(implementations._negated(sin), -sin)
