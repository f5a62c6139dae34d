"""Which backend runs a call, and the errors of those that cannot."""

import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
from concurrent import futures

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mvsplit_ops as mv
from bench.static import cuda_emulator
from bench.static.traffic import Recorder
from mvsplit_ops import _C, _backends

ROOT = pathlib.Path(__file__).parent.parent.parent


def backend_of_call(x):
    """Return the backend of a call of swiglu, from the op that runs."""
    with Recorder() as recorder:
        mv.swiglu(x)
    return recorder.calls[0][1][-1] if recorder.calls else "reference"


def test_the_default_depends_only_on_the_device_type():
    assert backend_of_call(torch.randn(4)) == "cpu"
    assert _backends.resolve("swiglu", None, torch.empty(0, device="meta")) == "cpu"


def test_triton_is_the_default_without_a_measurement():
    assert set(_backends.FASTEST) == {
        (c, op) for c in ((8, 0), (9, 0), (10, 0)) for op in _backends.OPS
    }
    for (capability, op), (backend, file) in _backends.FASTEST.items():
        if file is None:
            assert backend == _backends.DEFAULTS["cuda"] == "triton", (capability, op)
            continue
        records = map(json.loads, (ROOT / "bench/results" / file).read_text().splitlines())
        assert any("cuda" in record["run"]["device"].lower() for record in records), file


def test_the_default_of_a_gpu_is_the_fastest_measured_there(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert _backends.default("rope", gpu) == "triton"
    monkeypatch.setattr(_backends, "MEASURED", True)
    monkeypatch.setitem(_backends.FASTEST, ((9, 0), "swiglu"), ("cuda", "some.jsonl"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _backends.default("swiglu", gpu) == "cuda"
    assert _backends.default("rope", gpu) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert _backends.default("swiglu", gpu) == "triton"


def test_use_backend_nests_and_ends():
    x = torch.randn(4)
    with mv.use_backend("reference"):
        assert backend_of_call(x) == "reference"
        with mv.use_backend("cpu"):
            assert backend_of_call(x) == "cpu"
        assert backend_of_call(x) == "reference"
    assert backend_of_call(x) == "cpu"
    with pytest.raises(KeyError), mv.use_backend("reference"):
        raise KeyError
    assert backend_of_call(x) == "cpu"


def test_blocks_of_use_backend_end_in_any_order():
    x = torch.randn(4)
    names = ("reference", "cpu", "reference", "cpu")
    for order in itertools.permutations(range(4)):
        blocks = [mv.use_backend(name) for name in names]
        for block in blocks:
            block.__enter__()
        open_blocks = list(range(4))
        for i in order:
            assert backend_of_call(x) == mv.get_backend() == names[open_blocks[-1]]
            blocks[i].__exit__(None, None, None)
            open_blocks.remove(i)
        assert mv.get_backend() is None and backend_of_call(x) == "cpu"


def test_one_block_can_be_entered_again():
    block = mv.use_backend("reference")
    with block, mv.use_backend("cpu"), block:
        assert mv.get_backend() == "reference"
    with block:
        assert mv.get_backend() == "reference"
    assert mv.get_backend() is None


def test_use_backend_decorates_functions_and_generators_keep_theirs():
    @mv.use_backend("reference")
    def run(depth=1):
        return run(depth - 1) if depth else mv.get_backend()

    def generate(name):
        with mv.use_backend(name):
            yield mv.get_backend()
            yield mv.get_backend()

    assert run() == "reference" and mv.get_backend() is None
    first = generate("cpu")
    assert next(first) == "cpu"
    first.close()
    assert mv.get_backend() is None


def test_each_thread_has_its_own_backend():
    x, start = torch.randn(4), threading.Barrier(3)

    def run(name):
        with mv.use_backend(name):
            start.wait()
            seen = {backend_of_call(x) for _ in range(50)}
            start.wait()
        return seen, mv.get_backend()

    with futures.ThreadPoolExecutor(2) as pool, mv.use_backend("triton"):
        tasks = [pool.submit(run, name) for name in ("reference", "cpu")]
        start.wait()
        assert mv.get_backend() == "triton"
        start.wait()
        assert [t.result() for t in tasks] == [({"reference"}, None), ({"cpu"}, None)]
        assert pool.submit(mv.get_backend).result() is None


def test_each_asyncio_task_has_its_own_backend():
    x = torch.randn(4)

    async def run(name, turns):
        with mv.use_backend(name):
            seen = set()
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.add(backend_of_call(x))
            child = await asyncio.create_task(read())
        return seen, child

    async def read():
        return mv.get_backend()

    async def run_all():
        tasks = (run("reference", 3), run("cpu", 7), run("reference", 5), read())
        return await asyncio.gather(*tasks)

    *tasks, outside = asyncio.run(run_all())
    assert tasks == [({n}, n) for n in ("reference", "cpu", "reference")]
    assert outside is None and mv.get_backend() is None


def test_a_backward_runs_on_the_backend_of_its_forward_in_another_thread():
    x = torch.randn(4).requires_grad_()
    with mv.use_backend("cpu"):
        y = mv.swiglu(x)

    def backward():
        with mv.use_backend("triton"), Recorder() as recorder:
            y.sum().backward()
        return [args[-1] for _, args, _ in recorder.calls]

    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(backward).result() == ["cpu"]


def test_a_checkpointed_function_recomputes_on_the_backend_that_decorates_it():
    x = torch.randn(4).requires_grad_()
    y = checkpoint(mv.use_backend("reference")(mv.swiglu), x, use_reentrant=False)
    with Recorder() as recorder:
        y.sum().backward()
    assert not recorder.calls


@pytest.mark.parametrize("inside", [True, False])
def test_use_backend_in_and_around_compiled_code(inside):
    def run(x):
        if not inside:
            return mv.swiglu(x)
        with mv.use_backend("reference"):
            y = mv.swiglu(x)
            with mv.use_backend("cpu"):
                y = y + mv.swiglu(x)
        return y + mv.swiglu(x)

    def kernels(graph):
        calls = (n for n in graph.graph.nodes if "mvsplit" in str(n.target))
        return [n.args[-1] for n in calls]

    graphs = []

    def remember(graph, inputs):
        graphs.append(kernels(graph))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=remember)
    x = torch.randn(4)
    names = (None, "reference", "cpu", None, "reference")
    for name in names:
        with mv.use_backend(name) if name else contextlib.nullcontext():
            assert torch.allclose(compiled(x), run(x))
            with futures.ThreadPoolExecutor(1) as pool:
                assert torch.allclose(pool.submit(compiled, x).result(), run(x))
    expected = {("cpu", "cpu"), ("cpu",)} if inside else {("cpu",), ()}
    assert {tuple(g) for g in graphs} == expected
    assert mv.get_backend() is None


def test_the_argument_overrides_use_backend():
    x = torch.randn(4)
    with mv.use_backend("cuda"), cuda_emulator.using(None):
        assert torch.equal(mv.swiglu(x, backend="reference"), mv.reference.swiglu(x))
        with pytest.raises(RuntimeError, match="swiglu: backend 'cuda' cannot run here"):
            mv.swiglu(x)


def test_use_backend_is_seen_by_compiled_code():
    compiled = torch.compile(lambda x: mv.swiglu(x), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2))
    with (
        mv.use_backend("cuda"),
        cuda_emulator.using(None),
        pytest.raises(Exception, match="cannot run here"),
    ):
        compiled(torch.ones(2))


def test_an_unknown_backend_is_named():
    message = "must be one of reference, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=f"^rope: backend {message}"):
        mv.rope(torch.ones(1, 1, 1, 2), torch.ones(1, 1), torch.ones(1, 1), backend="gpu")
    with pytest.raises(ValueError, match=f"^use_backend: backend {message}"), mv.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="^swiglu: backend must be one of"):
        torch.ops.mvsplit.swiglu_fwd(torch.ones(2), None, True, "gpu")


@pytest.mark.parametrize("op", _backends.OPS)
def test_the_error_of_a_missing_backend_names_the_reason(op):
    reasons = {b: ops[op] for b, ops in mv.backends().items()}
    assert reasons["reference"] is None and reasons["cpu"] is None
    for backend in ("triton", "cuda"):
        if reasons[backend] is None:
            continue
        with cuda_emulator.using(None), pytest.raises(RuntimeError) as error:
            _backends.load_kernel(backend, op, "_fwd", "cpu")
        assert f"{op}: backend '{backend}' cannot run here: " in str(error.value)
        assert str(error.value).endswith("or pass backend='reference'")


def test_the_reference_has_no_kernel():
    with pytest.raises(RuntimeError, match="swiglu: backend 'reference' has no kernel"):
        torch.ops.mvsplit.swiglu_fwd(torch.ones(2), None, True, "reference")


def test_a_backend_refuses_the_tensors_of_another_device():
    with pytest.raises(RuntimeError, match="takes tensors on cpu, not cuda"):
        _backends.load_kernel("cpu", "rope", "_fwd", "cuda")


def test_a_device_without_a_default_backend():
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")
        is_cpu = False

    with pytest.raises(RuntimeError, match="no backend is the default on device type 'mps'"):
        _backends.resolve("rope", None, torch.empty(0).as_subclass(Elsewhere))


def test_without_the_extension_the_remedy_is_named():
    """In a checkout that is not built, everything except the cpu backend works."""
    code = (
        "import sys; sys.modules['mvsplit_ops._C'] = None\n"
        "import torch, mvsplit_ops as mv\n"
        "x = torch.randn(4)\n"
        "mv.swiglu(x, backend='reference')\n"
        "try: mv.swiglu(x)\n"
        "except RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "swiglu: backend 'cpu' cannot run here: the C++ extension is not built; run pip"
        in done.stdout
    )


def test_triton_without_gpu_or_interpreter_names_the_remedy():
    code = (
        "import torch, mvsplit_ops as mv\n"
        "try: mv.swiglu(torch.randn(4), backend='triton')\n"
        "except RuntimeError as e: print(e)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (
        "swiglu: backend 'triton' cannot run here: CPU tensors need Triton's interpreter; "
        "set TRITON_INTERPRET=1 before Python starts; or pass backend='reference'" in done.stdout
    )


def test_an_old_triton_is_named(monkeypatch):
    from mvsplit_ops.triton_kernels import _common

    monkeypatch.setattr(_common.triton, "__version__", "3.4.0")
    assert _common.find_missing("cuda").startswith("Triton must be 3.5 or newer, got 3.4.0; run")
    monkeypatch.setattr(_common.triton, "__version__", "3.10.0+git1")
    assert _common.find_missing("cuda") is None


def test_the_report_shows_each_backend_and_reason():
    command = [sys.executable, "-m", "mvsplit_ops"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for op in _backends.OPS:
        (line,) = (line.split() for line in done.stdout.splitlines() if line.startswith(f"{op} "))
        reasons = [ops[op] for ops in mv.backends().values()]
        assert line[1:] == ["yes" if r is None else "-" for r in reasons]
    for ops in mv.backends().values():
        for reason in filter(None, ops.values()):
            assert reason in done.stdout


def test_import_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import mvsplit_ops, bench.measure.profile, model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_instruction_sets_can_be_chosen_and_a_wrong_one_is_named():
    before = _C.capability()
    for name in _C.capabilities():
        _C.set_capability(name)
        assert _C.capability() == name
    with pytest.raises(ValueError, match="instruction set must be one of .*got 'AVX9'"):
        _C.set_capability("AVX9")
    _C.set_capability(before)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_backward_ops_never_read_out_of_bounds(backend):
    """A backward kernel refuses shapes that do not fit together, even in a direct call."""
    ops, x = torch.ops.mvsplit, torch.randn(2, 4, 8)
    q, rstd, a = torch.randn(2, 4, 1, 8), torch.rand(2, 4), torch.rand(8)
    mean = torch.rand(2, 1, 8)
    calls = (
        lambda: ops.swiglu_bwd(torch.randn(2, 4, 3), x, None, True, backend),
        lambda: ops.swiglu_bwd(torch.randn(2, 4, 4).double(), x, None, True, backend),
        lambda: ops.rope_bwd(q, torch.rand(3, 4), torch.rand(3, 4), False, False, backend),
        lambda: ops.qk_norm_bwd(
            q, q, q[:1], q, rstd[..., None], rstd[..., None], None, None, backend
        ),
        lambda: ops.qk_norm_bwd(q, q, q, q, rstd, rstd[..., None], None, None, backend),
        lambda: ops.residual_rmsnorm_bwd(x, x[:1], None, None, None, rstd, backend),
        lambda: ops.residual_rmsnorm_bwd(x, x, None, a, None, rstd, backend),
        lambda: ops.mvsplit_rmsnorm_bwd(x, x, x, a, a, None, rstd, mean, mean, [3], backend),
        lambda: ops.mvsplit_rmsnorm_bwd(x, x, x, a, a, None, rstd, mean, mean[:1], [4], backend),
        lambda: ops.mvsplit_rmsnorm_bwd(x, x, x, a, a, None, rstd[:1], mean, mean, [4], backend),
        lambda: ops.mvsplit_rmsnorm_bwd(x, x, x, a[:4], a, None, rstd, mean, mean, [4], backend),
        lambda: ops.mvsplit_rmsnorm_bwd(
            x, x.bfloat16(), x, a, a, None, rstd, mean, mean, [4], backend
        ),
    )
    if torch.cuda.is_available() and backend != "cpu":
        pytest.skip("on a GPU machine these kernels take only tensors on the GPU")
    for call in calls:
        with pytest.raises(RuntimeError, match="mvsplit_ops: "):
            call()
