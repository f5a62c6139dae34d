"""The sweep over operators, shapes and implementations: wrong, missing and interrupted ones."""

import contextlib
import json
import types

import pytest
import torch

from bench.__main__ import main
from bench.cases import CASES, Shape
from bench.common import records, timing
from bench.measure import implementations, sweep
from bench.measure.sweep import Column, Point

TINY = Shape(B=1, segments=(9, 4), D=128, H=1, F=24)
BY_NAME = {case.op: case for case in CASES}
SMALL = ["ops", "--tokens", "5,3", "--dim", "128", "--batch", "1", "--repeats", "1"]


def measured(names, op="swiglu", **changes):
    return list(sweep.measure([BY_NAME[op]], [TINY], names, 2, **changes))


def test_implementations_are_timed_or_have_a_reason():
    (point,) = measured(["eager", "cpu", "liger", "published"])
    assert set(point.columns) == {"eager", "cpu"} and not point.failed
    for column in point.columns.values():
        assert all(s > 0 for s in column.seconds) and column.host_seconds > 0
        assert column.method == "wall clock" and column.launches is None
    assert "CUDA device" in point.missing["liger"] and set(point.missing) == {"liger", "published"}
    case = BY_NAME["swiglu"]
    moved = (case.fwd(TINY) * TINY.pass_bytes, case.bwd(TINY) * TINY.pass_bytes)
    assert point.must_move == moved


def test_a_record_is_equal_after_a_round_trip():
    (point,) = measured(["eager"])
    assert Point.from_json(json.loads(json.dumps(point.to_json()))) == point
    assert point.to_json()["kind"] == "ops"


@contextlib.contextmanager
def replaced(monkeypatch, replaced_name, replace):
    """One implementation is eager code, changed by `replace`."""
    load, missing_reason = implementations.load_function, implementations.missing_reason

    def load_replaced(name, case, *rest):
        return replace(case.reference) if name == replaced_name else load(name, case, *rest)

    def no_reason(name, *rest):
        return None if name == replaced_name else missing_reason(name, *rest)

    monkeypatch.setattr(implementations, "load_function", load_replaced)
    monkeypatch.setattr(implementations, "missing_reason", no_reason)
    yield


def inaccurate(function):
    return lambda *inputs: tuple(1.1 * t for t in function(*inputs))


def broken(function):
    def call(*inputs):
        raise KeyError("no such kernel")

    return call


@pytest.mark.parametrize(
    ("replace", "reason"), [(inaccurate, "largest error"), (broken, "KeyError")]
)
def test_a_wrong_peer_is_shown_as_failing_and_not_timed(monkeypatch, capsys, replace, reason):
    with replaced(monkeypatch, "liger", replace):
        assert main([*SMALL, "--op", "swiglu", "--implementation", "eager", "liger"]) == 0
        (point,) = measured(["eager", "liger"])
    assert set(point.columns) == {"eager"} and reason in point.failed["liger"]
    shown = capsys.readouterr().out
    assert "failed" in shown and reason in shown


def test_a_wrong_backend_fails_the_command_after_recording_everything(
    monkeypatch, tmp_path, capsys
):
    file = tmp_path / "ops.jsonl"
    args = [*SMALL, "--op", "swiglu", "rope", "--implementation", "cpu", "--json", str(file)]
    with replaced(monkeypatch, "cpu", inaccurate):
        assert main(args) == 2
    assert "swiglu, cpu, result 0: largest error" in capsys.readouterr().err
    assert [r["failed"].keys() for r in records.read(file)] == [{"cpu"}, {"cpu"}]


def test_an_interrupted_run_leaves_its_records(monkeypatch, tmp_path, capsys):
    file, time_functions = tmp_path / "ops.jsonl", sweep._time_functions
    calls = []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return time_functions(*args)

    monkeypatch.setattr(sweep, "_time_functions", once)
    args = [*SMALL, "--op", "swiglu", "rope", "--implementation", "eager", "--json", str(file)]
    assert main(args) == 130
    (record,) = records.read(file)
    assert record["kind"] == "ops" and "interrupted" in capsys.readouterr().err


def test_the_command_sweeps_and_prints(capsys):
    args = ["--tokens", "4", "5,3", "--dtype", "fp32", "bf16", "--dim", "128", "256"]
    args = ["ops", *args, "--batch", "1", "2", "--repeats", "1", "--op", "swiglu"]
    assert main([*args, "--implementation", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("SwiGLU") == 16 and "2 x 5+3, 256, bfloat16" in shown
    assert "% of copy" in shown and "host us" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "gelu"], "choose from"),
        (["--implementation", "apex"], "choose from"),
        (["--dim", "100"], "multiple of 128"),
        (["--batch", "0"], "at least 1"),
    ],
    ids=lambda a: a if isinstance(a, str) else a[0],
)
def test_the_error_for_bad_options_lists_the_choices(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ops", *args])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line


@pytest.mark.parametrize("command", [SMALL, ["traffic"], ["device", "--out", "nowhere"]])
def test_the_error_for_a_folder_that_is_not_a_checkout_is_one_line(command, tmp_path, capsys):
    assert main([*command, "--published", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--published: {tmp_path} is not a checkout of erwold/mv-split: expected" in line


def test_the_share_of_the_copy_is_of_forward_and_backward():
    column = Column((1e-3, 2e-3, 4e-3), 1e-6, (1, 2), "graph replay")
    run = {"shape": {"B": 1, "segments": [4], "D": 128, "dtype": "bfloat16"}, "repeats": 1}
    run |= {"device": "d", "threads": 1, "torch": "t", "date": "d", "commit": "c"}
    point = Point(run, "swiglu", "SwiGLU", (3e6, 5e6), 4e9, {"cuda": column}, {}, {})
    assert point.bytes_per_second("cuda") == 2e9
    (row,) = zip(
        *(list(c.cells) for c in sweep.make_table([point]).to_terminal().columns), strict=True
    )
    assert row[2:7] == ("cuda", "1,000.0", "2,000.0", "4,000.0", "1.0")
    assert row[7:] == ("1 / 2", "2.0", "50%", "–")


@pytest.fixture
def fake_cuda_graphs(monkeypatch):
    """CUDA graphs without a GPU: a capture runs its calls at once, a replay does nothing."""
    captures = []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            captures.append("replayed")

    @contextlib.contextmanager
    def capturing(graph, stream):
        captures.append(stream)
        yield

    for name, fake in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capturing,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return captures


def test_a_replay_has_every_set_of_inputs(fake_cuda_graphs, monkeypatch):
    monkeypatch.setattr(timing, "_L2_FLUSH_BYTES", 3 * 2 * 13 * 48 - 1)
    case = BY_NAME["swiglu"]
    sets = timing.make_input_sets(case, TINY)
    assert len(sets) == 3 and len({s[0][0].data_ptr() for s in sets}) == 3
    assert all(torch.equal(s[0][0], sets[0][0][0]) for s in sets)
    pointers = []

    def call(*inputs):
        pointers.append(inputs[0][0].data_ptr())
        return case.reference(*inputs)

    cotangents = [[torch.ones(1, 13, 24, dtype=torch.bfloat16)]] * 3
    replay = timing.Replay(call, sets, cotangents)
    assert replay.count == 3 and len(set(pointers)) == 3
    streams = set(map(id, fake_cuda_graphs))
    assert len(fake_cuda_graphs) == 3 and len(streams) == 1  # one stream captures all three
    replay.both()
    assert fake_cuda_graphs[-1] == "replayed"


def test_a_call_that_cannot_be_captured_is_timed_by_events(monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(sweep, "Replay", refuse)
    monkeypatch.setattr(sweep, "_count_launches", lambda *call: (1, 2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = BY_NAME["swiglu"]
    columns = sweep._time_on_gpu(case, TINY, {"eager": case.reference}, 2)
    assert columns["eager"].method.startswith("events; not captured: operation not permitted")
    assert "more" not in columns["eager"].method and columns["eager"].launches == (1, 2)


def test_gpu_launches_are_counted_forward_and_backward(monkeypatch):
    kinds = iter([3, 5])

    class Profiler:
        def __enter__(self):
            self.kernels = next(kinds)
            return self

        def __exit__(self, *unused):
            pass

        def events(self):
            cuda = types.SimpleNamespace(device_type=sweep.DeviceType.CUDA)
            return [cuda] * self.kernels + [types.SimpleNamespace(device_type=sweep.DeviceType.CPU)]

    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert sweep._count_launches(lambda: "outputs", lambda outputs: outputs) == (3, 5)
