"""Replay of trace files and runs: names, cadences, missing signals, damaged files."""

import json
import math
import random

import pytest

from model.config import UsageError
from model.stability.guard import LOCKED, TRIP
from model.stability.replay import collect_findings, describe
from model.stability.trace import load_trace, replay_guard
from tests.model.sample_traces import DEPTH, collapsing_rows, write_trace


def edit(path, change):
    """Change the data of a trace file; return its path."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def replay(path):
    """Return a trace and a guard that observed it."""
    trace = load_trace(path)
    return trace, replay_guard(trace)


def test_a_trace_file_and_a_run_give_the_same_detections(tmp_path):
    rows = collapsing_rows()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"depth": DEPTH}))
    (_, file_guard), (_, run_guard) = replay(write_trace(tmp_path, rows)), replay(tmp_path)
    assert file_guard.first == run_guard.first and set(file_guard.first) >= {TRIP, LOCKED}
    assert file_guard.first[TRIP].step == 80


@pytest.mark.parametrize("every", [1, 10, 25])
def test_a_collapse_is_detected_at_any_cadence(tmp_path, every):
    _, guard = replay(write_trace(tmp_path, collapsing_rows(every=every)))
    assert guard.first[LOCKED][0] <= 85 * every + 1


def test_aliases_are_accepted(tmp_path):
    def rename(data):
        data["config"] = {"N_LAYERS": 100}
        data["layerwise"]["token_sim"] = data["layerwise"].pop("tcs")
        data["scalars"]["rho_stage79_img"] = data["layerwise"].pop("rho")["99"]

    trace, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), rename))
    assert trace.depth == 100 and LOCKED in guard.first and guard.describe_missing() == []


def test_series_with_different_steps_are_aligned(tmp_path):
    def thin(data):
        for table, every in ((data["layerwise"]["tcs"], 3), (data["scalars"], 2)):
            for series in table.values():
                series.update(s=series["s"][::every], v=series["v"][::every])

    trace, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), thin))
    assert TRIP in guard.first and LOCKED in guard.first
    assert any("TCS of the last block" in text for text in guard.describe_missing())


def keep_layers(*layers):
    def change(data):
        for table in data["layerwise"].values():
            for layer in list(table):
                if layer not in layers:
                    del table[layer]

    return change


def drop(*names):
    def change(data):
        for name in names:
            for part in ("scalars", "layerwise"):
                data[part].pop(name, None)

    return change


@pytest.mark.parametrize(
    ("change", "missing", "locked"),
    [
        (
            keep_layers("99"),
            "TCS at three quarters of the depth (tcs): in no line; LOCKED depends",
            True,
        ),
        (keep_layers("75"), "TCS at three quarters of the depth", True),
        (drop("tcs"), "replaced by rho^2 / (1 + rho^2)", True),
        (drop("tcs", "rho"), "TCS of the last block (tcs): in no line; LOCKED cannot", False),
        (
            drop("writer_G_ctr", "writer_G_mean"),
            "(writer_G_ctr): in no line; LOCKED cannot",
            False,
        ),
        (drop("loss"), "loss: in no line", True),
        (drop("grad_norm"), "in no line; WATCH cannot be detected", True),
    ],
)
def test_missing_signals_are_listed_and_the_others_judged(tmp_path, change, missing, locked):
    _, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    assert any(missing in text for text in guard.describe_missing()), guard.describe_missing()
    assert (LOCKED in guard.first) == locked
    assert TRIP in guard.first


def test_the_gradient_norm_of_queries_replaces_a_missing_centred_norm(tmp_path):
    def change(data):
        G = data["scalars"].pop("writer_G_ctr")
        data["scalars"]["global_Q"] = {"s": G["s"], "v": [0.5 * v for v in G["v"]]}

    _, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    assert LOCKED in guard.first
    assert any(
        "replaced by the gradient norm of W_Q (global_Q)" in text
        for text in guard.describe_missing()
    )


@pytest.mark.parametrize("name", ["G", "writer_G"])
def test_writer_modes_by_layer_are_summed(tmp_path, name):
    def change(data):
        for part in ("mean", "ctr"):
            series = data["scalars"].pop(f"writer_G_{part}")
            half = {"s": series["s"], "v": [v / 2**0.5 for v in series["v"]]}
            data["layerwise"][f"{name}_{part}"] = {"50": half, "99": half}

    _, got = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    _, want = replay(write_trace(tmp_path, collapsing_rows()))
    assert {s: n for s, (n, _) in got.first.items()} == {s: n for s, (n, _) in want.first.items()}
    assert got.describe_missing() == []


def test_a_ratio_without_its_parts_is_used(tmp_path):
    def change(data):
        mean, centred = (data["scalars"].pop(f"writer_G_{part}") for part in ("mean", "ctr"))
        ratio = [m / c for m, c in zip(mean["v"], centred["v"], strict=True)]
        data["scalars"]["writer_ratio"] = {"s": mean["s"], "v": ratio}

    _, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    assert "G_mean/G_ctr" in " ".join(guard.first[TRIP][1]) and LOCKED not in guard.first
    assert any(
        "(writer_G_ctr): in no line; LOCKED cannot be detected" in m
        for m in guard.describe_missing()
    )


def test_a_signal_that_is_missing_in_some_lines_is_not_replaced(tmp_path):
    """A line without G_ctr is not judged by the gradient norm of W_Q, whose scale differs."""

    def change(data):
        G = data["scalars"]["writer_G_ctr"]
        data["scalars"]["deep_Q"] = {"s": G["s"], "v": [1e-6] * len(G["v"])}
        for part in (G, data["scalars"]["writer_G_mean"]):
            part["v"][90:] = [None] * len(part["v"][90:])
        data["layerwise"]["tcs"]["99"]["v"][70:] = [0.99] * 49
        data["layerwise"]["tcs"]["75"]["v"][70:] = [0.99] * 49
        G["v"][70:90] = [0.003] * 20

    _, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    assert LOCKED not in guard.first and not any(
        "replaced by" in text for text in guard.describe_missing()
    )


def test_one_repeated_sample_does_not_count_as_two(tmp_path):
    """The last block is sampled less often than other layers."""

    def change(data):
        data["scalars"]["writer_G_ctr"]["v"][60:] = [1e-5] * 59
        tcs = data["layerwise"]["tcs"]
        tcs["75"]["v"] = [0.99] * 119
        tcs["99"] = {"s": list(range(1, 120, 10)), "v": [0.5] * 9 + [0.99] + [0.5] * 2}

    _, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    assert LOCKED not in guard.first
    assert "TCS of the last block (tcs): in 12 of 119 lines" in guard.describe_missing()


def test_the_preferred_of_two_names_for_a_metric_is_used_and_noted(tmp_path):
    def change(data):
        scalars = data["scalars"]
        raw, rho = scalars["grad_norm"], data["layerwise"].pop("rho")["99"]
        scalars["grad_norm_raw"] = {"s": raw["s"], "v": list(raw["v"])}
        scalars["grad_norm"] = {"s": raw["s"], "v": [1.0] * len(raw["s"])}  # clipped
        for stage, factor in ((10, 0.1), (79, 1.0), (30, 0.2)):
            values = [factor * v for v in rho["v"]]
            scalars[f"rho_stage{stage}_img"] = {"s": rho["s"], "v": values}
        scalars["step"] = scalars["layerwise"] = {"s": [1, 2], "v": [0.1, None]}

    trace, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), change))
    text = " ".join(guard.first[TRIP][1])
    assert "gradient norm 8 >" in text and "rho 5 >" in text
    assert "grad_norm and grad_norm_raw are both grad_norm; grad_norm_raw is used" in trace.notes
    assert any("rho_stage30_img are both rho; rho_stage79_img is used" in n for n in trace.notes)
    assert "step is not a valid name of a metric; ignored" in trace.notes


def test_sparse_lines_before_dense_ones_are_not_gaps(tmp_path):
    rows = [
        r for r in collapsing_rows(steps=700, onset=650) if r["step"] % 10 == 0 or r["step"] > 590
    ]
    assert load_trace(write_trace(tmp_path, rows)).notes == []


def test_gaps_and_nan_are_noted(tmp_path):
    def harm(data):
        loss, tcs = data["scalars"]["loss"], data["layerwise"]["tcs"]["99"]
        loss["v"][10:15] = [math.nan] * 5
        tcs["v"][20] = None
        for table in (data["scalars"], *data["layerwise"].values()):
            for series in table.values():
                for part in ("s", "v"):
                    del series[part][40:60]

    trace, guard = replay(edit(write_trace(tmp_path, collapsing_rows()), harm))
    assert "loss: 5 of 99 values are not numbers" in trace.notes
    assert "tcs of layer 99: 1 of 99 values are not numbers" in trace.notes
    assert "no line between steps 40 and 61" in trace.notes
    assert "loss: in 94 of 99 lines" in guard.describe_missing()
    assert {TRIP, LOCKED} <= set(guard.first)


def test_unreadable_lines_of_a_run_are_counted(tmp_path):
    lines = [json.dumps(row) for row in collapsing_rows()]
    lines[3], lines[7], lines[9] = lines[3][:20], '{"step": Infinity}', "[1]"
    lines.insert(30, lines[30])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    trace, guard = replay(tmp_path)
    assert "3 of 119 lines cannot be read" in trace.notes
    assert "step 31 occurs twice; the later line is used" in trace.notes
    assert any("no configuration states the depth; 100" in note for note in trace.notes)
    assert LOCKED in guard.first


def damage(data, chance):
    """Damage values, steps, series, layers and whole parts at random; the file remains JSON."""
    for part in ("scalars", "layerwise"):
        for name in list(data[part]):
            if chance.random() < 0.15:
                del data[part][name]
    tables = [data["scalars"], *data["layerwise"].values()]
    for table in tables:
        for name in list(table):
            series = table[name]
            if chance.random() < 0.3:
                indices = sorted(chance.sample(range(len(series["s"])), chance.randrange(1, 60)))
                series.update({k: [series[k][i] for i in indices] for k in ("s", "v")})
            for i in range(len(series["v"])):
                if chance.random() < 0.05:
                    unusual = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, "x", True, [], 1e300]
                    series["v"][i] = chance.choice(unusual)
                if chance.random() < 0.02:
                    series["s"][i] = chance.choice([None, 5, -3, 1e6, "7", "x", math.inf])
            if chance.random() < 0.05:
                table[name] = chance.choice([None, {}, {"s": [1]}, [], {"s": [1, 2], "v": [1]}])
            if chance.random() < 0.1:
                table[chance.choice(["3", "x", "-1", ""])] = table.pop(name)


def test_a_damaged_trace_does_not_crash_a_replay(tmp_path):
    described = 0
    for seed in range(150):
        path = write_trace(tmp_path, collapsing_rows())
        edit(path, lambda data, seed=seed: damage(data, random.Random(seed)))
        try:
            trace, guard = replay(path)
        except UsageError as error:
            assert "contains no line of a step" in str(error)
            continue
        text = describe(collect_findings(trace, guard))
        json.dumps(guard.dump(), allow_nan=False)
        described += "Verdict: " in text[0]
    assert described > 140


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a trace must be JSON"),
        ("[1]", "a trace must be JSON"),
        ('{"scalars": [], "layerwise": 3}', "a trace must be JSON"),
        ("{}", "contains no line of a step"),
        ('{"scalars": {"loss": {"s": [], "v": []}}}', "contains no line of a step"),
    ],
)
def test_an_invalid_trace_raises_one_error(tmp_path, text, message):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_trace(tmp_path / "trace.json")
    with pytest.raises(UsageError, match="neither metrics.jsonl nor trace.json"):
        load_trace(tmp_path.parent)
    with pytest.raises(UsageError, match="cannot read the trace"):
        load_trace(tmp_path / "none.json")
