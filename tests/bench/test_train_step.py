"""Whole training steps: turns of the variants, breakdown, tables, command."""

import json
import types

import pytest
import torch
from torch.autograd import DeviceType

from bench.__main__ import main
from bench.measure import train_step
from bench.measure.op_ranges import BLOCK, Range
from bench.measure.workload import Workload
from bench.static import cuda_emulator
from model.config import preset

SMALL = {"depth": 2, "batch": 2, "device": "cpu", "probes": False}


def test_variants_are_timed_in_turn_and_split_up():
    step_counts = []
    variants = [
        (residual, implementation, policy)
        for residual in ("layerscale", "mvsplit")
        for implementation, policy in (("cpu", "none"), ("eager", "full"))
    ]
    result = train_step.measure(
        "collapse100", SMALL, variants, 2, progress=lambda _, steps: step_counts.append(steps)
    )
    assert [(r.residual, r.implementation, r.checkpointing) for r in result.rows] == variants
    assert step_counts == [12] * 12
    for row in result.rows:
        assert row.gradients > 0 and row.update > 0 and row.loader > 0
        assert list(row.breakdown) == list(train_step.STEP_PARTS)
        assert sum(row.breakdown.values()) >= row.step * (1 - 1e-9)
        for part in ("matrix products", "attention", "operators", "optimizer"):
            assert row.breakdown[part] > 0, part
        assert row.breakdown["communication"] == 0
        tokens = 2 * (64 + 4)
        assert row.tokens_per_second == pytest.approx(tokens / row.step)
    eager, cpu = (next(r for r in result.rows if r.implementation == n) for n in ("eager", "cpu"))
    assert eager.flops == cpu.flops > 0  # recomputed ones do not count
    assert result.run["config"]["depth"] == 2 and result.run["matmul_flops_per_second"] > 0
    assert train_step.Steps.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_recomputing_takes_less_memory():
    load = Workload(preset("collapse100", **{**SMALL, "depth": 8}))
    peaks = {}
    for policy in ("none", "full"):
        with load.running("cpu", policy):
            load.step()
            peaks[policy] = load.measure_peak()
    assert peaks["full"] < 0.8 * peaks["none"]


def test_a_policy_that_runs_out_of_memory_is_reported_and_the_others_are_timed(monkeypatch):
    step = Workload.step

    def full_memory(load):
        if load.model.config.checkpointing == "none":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")
        step(load)

    monkeypatch.setattr(Workload, "step", full_memory)
    variants = [("mvsplit", "cpu", policy) for policy in ("none", "full")]
    result = train_step.measure("collapse100", SMALL, variants, 1)
    assert [row.checkpointing for row in result.rows] == ["full"]
    assert result.failed == {"mvsplit, cpu, none": "CUDA out of memory. Tried to allocate 1 TiB"}
    with pytest.raises(RuntimeError, match="no step fits in memory"):
        train_step.measure("collapse100", SMALL, variants[:1], 1)


def test_one_model_serves_every_implementation_and_is_restored():
    load = Workload(preset("collapse100", **SMALL))
    blocks, config = load.model.blocks, load.model.config
    with pytest.raises(KeyError), load.running("compile", "full"):
        assert load.model.blocks is not blocks and load.model.config.checkpointing == "full"
        assert next(load.model.blocks.parameters()) is next(blocks.parameters())
        raise KeyError
    assert load.model.blocks is blocks and load.model.config is config


def event(name, cpu=0.0, gpu=0.0, parent=None):
    return types.SimpleNamespace(
        name=name,
        self_cpu_time_total=1e6 * cpu,
        self_device_time_total=1e6 * gpu,
        cpu_parent=parent,
        device_type=DeviceType.CPU,
    )


def test_the_time_of_a_step_is_split_into_its_parts():
    merge = event(str(Range("mvsplit_rmsnorm", "fwd", 0)), cpu=9.0)
    block = event(str(Range(BLOCK, "fwd", 0)), cpu=9.0)
    update = event(str(train_step.UPDATE), cpu=9.0)
    events = [
        *(merge, block, update),
        event("aten::mul", 1.0, 0.1, merge),
        event("mvsplit::swiglu_fwd", 2.0, 0.2),
        event("aten::mm", 3.0, 0.3, block),
        event("aten::_scaled_dot_product_flash_attention", 4.0, 0.4, block),
        event("aten::add", 5.0, 0.5, block),
        event("aten::_fused_adamw_", 6.0, 0.6, update),
        event("c10d::allreduce_", 7.0, 0.7),
        event("## Call CompiledFxGraph fswy ##", 8.0),
        event("autograd::engine::evaluate_function: MulBackward0", 9.0),
        event("CompiledFunction", 9.0),
    ]
    assert list(train_step.sum_parts(events, cuda=False)) == list(train_step.STEP_PARTS[:-1])
    seconds = [3.0, 4.0, 1.0 + 2.0, 5.0 + 8.0, 6.0, 7.0]
    assert list(train_step.sum_parts(events, cuda=False).values()) == pytest.approx(seconds)
    seconds = [0.3, 0.4, 0.1 + 0.2, 0.5, 0.6, 0.7]
    assert list(train_step.sum_parts(events, cuda=True).values()) == pytest.approx(seconds)


def a_row(implementation, gradients):
    return train_step.StepTiming(
        residual="mvsplit",
        implementation=implementation,
        checkpointing="none",
        loader=1e-3,
        gradients=gradients,
        update=1.0,
        breakdown=dict.fromkeys(train_step.STEP_PARTS, 0.5),
        tokens_per_second=100.0,
        flops=10**12,
        peak_bytes=None,
    )


def test_the_table_compares_with_the_first_and_with_the_matrix_products():
    config = {"depth": 1, "dim": 1, "batch": 1, "precision": "fp32", "data": "shapes"}
    run = {"device": "d", "threads": 1, "preset": "p", "repeats": 1, "torch": "t", "date": "d"}
    run |= {"commit": "c", "config": config, "matmul_flops_per_second": 2e12}
    rows = [a_row("eager", 1.0), a_row("cpu", 0.0)]
    steps = train_step.Steps(run, rows, {"mvsplit, cpu, none": "out of memory"})
    assert "mvsplit, cpu, none: out of memory" in train_step.format_notes(steps)
    cells = zip(train_step.STEP_COLUMNS, *train_step.format_rows(steps), strict=True)
    columns = {name: values for name, *values in cells}
    assert columns["vs first"] == ["1.00x", "2.00x"]
    assert columns["TFLOP/s"] == ["0.500", "1.000"] and columns["% of matmul"] == ["25%", "50%"]
    names, rows = train_step.format_breakdown(steps)
    assert names[4] == "attention ms" and [row[4] for row in rows] == ["500.0", "500.0"]


def test_the_default_is_every_implementation_then_every_policy():
    variants = train_step._make_variants(["mvsplit"], ["eager", "cpu"], "none", ["none", "full"])
    assert variants == [
        ("mvsplit", "eager", "none"), ("mvsplit", "cpu", "none"), ("mvsplit", "cpu", "full")
    ]  # fmt: skip


def test_latents_without_a_folder_are_random():
    overrides = {**SMALL, "text_tokens": 4, "size": 4, "dim": 32, "heads": 2, "ffn": 96}
    overrides |= {"text_dim": 32, "data_path": "", "micro_batch": 0, "precision": "fp32"}
    config = preset("dit400-mvsplit", **overrides)
    load = Workload(config)
    assert load.batch.x0.shape == (2, 128, 4, 4)
    assert torch.equal(load.draw(3).x0, load.draw(3).x0)
    assert not torch.equal(load.draw(3).x0, load.draw(4).x0)


def test_the_command_prints_and_records(tmp_path, capsys):
    path, trace = tmp_path / "steps.jsonl", tmp_path / "t.json"
    args = ["step", "tiny", "--repeats", "1", "--blocks", "2", "--batch", "2", "--nvtx"]
    args += ["--implementation", "reference", "cpu", "--checkpointing", "full"]
    assert main([*args, "--json", str(path), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "One optimizer step" in shown and "Breakdown" in shown
    record = json.loads(path.read_text())
    assert record["kind"] == "step" and json.loads(trace.read_text())["traceEvents"]
    variants = [(r["implementation"], r["checkpointing"]) for r in record["rows"]]
    assert variants == [("eager", "none"), ("cpu", "none"), ("cpu", "full")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "dept=2"], "unknown field 'dept', did you mean depth"),
        (["--json", "nowhere/x.jsonl"], "no folder"),
        (["--backend", "cuda"], "backend 'cuda' cannot run here"),
        (["--implementation", "triton"], "nothing to time"),
        (["--backend", "apex"], "must be one of eager, compile, cpu"),
        (["--residual", "rez"], "unknown residual 'rez', did you mean rezero?"),
        (["--checkpointing", "4/3"], "checkpointing must be none, full"),
        (["--device", "cuda:9"], "cannot use 'cuda:9' here"),
    ],
    ids=lambda a: a if isinstance(a, str) else a[0],
)
def test_the_error_for_bad_input_is_one_line(args, message, capsys):
    with cuda_emulator.using(None):
        assert main(["step", "tiny", "--blocks", "1", *args]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_error_for_an_unknown_preset_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["step", "collapse1000"])
    assert "dit1000-mvsplit" in capsys.readouterr().err
