"""Replays of trace files and runs: other names and cadences, what is missing, any damage."""

import json
import math
import random

import pytest

from model.stability.guard import LOCKED, TRIP
from model.stability.trace import load, replay
from tests.model.sample_traces import DEPTH, collapse, trace


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def verdict(path):
    seen = load(path)
    return seen, replay(seen)


def test_a_trace_file_and_a_run_tell_the_same(tmp_path):
    rows = collapse()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"depth": DEPTH}))
    (_, of_file), (_, of_run) = verdict(trace(tmp_path, rows)), verdict(tmp_path)
    assert of_file.first == of_run.first and set(of_file.first) >= {TRIP, LOCKED}
    assert of_file.first[TRIP][0] == 80


@pytest.mark.parametrize("every", [1, 10, 25])
def test_any_cadence_will_do(tmp_path, every):
    _, guard = verdict(trace(tmp_path, collapse(every=every)))
    assert guard.first[LOCKED][0] <= 85 * every + 1


def test_other_names_are_understood(tmp_path):
    def rename(data):
        data["config"] = {"N_LAYERS": 100}
        data["layerwise"]["token_sim"] = data["layerwise"].pop("tcs")
        data["scalars"]["rho_stage79_img"] = data["layerwise"].pop("rho")["99"]

    seen, guard = verdict(changed(trace(tmp_path, collapse()), rename))
    assert seen.depth == 100 and LOCKED in guard.first and guard.missing() == []


def test_series_with_steps_of_their_own_are_brought_together(tmp_path):
    def thin(data):
        for table, every in ((data["layerwise"]["tcs"], 3), (data["scalars"], 2)):
            for series in table.values():
                series.update(s=series["s"][::every], v=series["v"][::every])

    seen, guard = verdict(changed(trace(tmp_path, collapse()), thin))
    assert TRIP in guard.first and LOCKED in guard.first
    assert any("TCS of the last block" in text for text in guard.missing())


def only(*layers):
    def change(data):
        for table in data["layerwise"].values():
            for layer in list(table):
                if layer not in layers:
                    del table[layer]

    return change


def without(*names):
    def change(data):
        for name in names:
            for part in ("scalars", "layerwise"):
                data[part].pop(name, None)

    return change


@pytest.mark.parametrize(
    ("change", "missing", "locked"),
    [
        (only("99"), "TCS three quarters of the way (tcs): in no line; LOCKED rests on", True),
        (only("75"), "TCS three quarters of the way", True),
        (without("tcs"), "rho^2 / (1 + rho^2) stands in", True),
        (without("tcs", "rho"), "TCS of the last block (tcs): in no line; LOCKED cannot", False),
        (
            without("writer_G_ctr", "writer_G_mean"),
            "(writer_G_ctr): in no line; LOCKED cannot",
            False,
        ),
        (without("loss"), "loss: in no line", True),
        (without("grad_norm"), "in no line; WATCH cannot be told", True),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_told(tmp_path, change, missing, locked):
    _, guard = verdict(changed(trace(tmp_path, collapse()), change))
    assert any(missing in text for text in guard.missing()), guard.missing()
    assert (LOCKED in guard.first) == locked
    assert TRIP in guard.first


def test_the_gradient_of_queries_stands_in_for_the_centred_one(tmp_path):
    def change(data):
        G = data["scalars"].pop("writer_G_ctr")
        data["scalars"]["global_Q"] = {"s": G["s"], "v": [0.5 * v for v in G["v"]]}

    _, guard = verdict(changed(trace(tmp_path, collapse()), change))
    assert LOCKED in guard.first
    assert any("W_Q (global_Q) stands in" in text for text in guard.missing())


@pytest.mark.parametrize("name", ["G", "writer_G"])
def test_writer_modes_by_layer_are_added_up(tmp_path, name):
    def change(data):
        for part in ("mean", "ctr"):
            series = data["scalars"].pop(f"writer_G_{part}")
            half = {"s": series["s"], "v": [v / 2**0.5 for v in series["v"]]}
            data["layerwise"][f"{name}_{part}"] = {"50": half, "99": half}

    _, got = verdict(changed(trace(tmp_path, collapse()), change))
    _, want = verdict(trace(tmp_path, collapse()))
    assert {s: n for s, (n, _) in got.first.items()} == {s: n for s, (n, _) in want.first.items()}
    assert got.missing() == []


def test_a_ratio_alone_is_understood(tmp_path):
    def change(data):
        mean, centred = (data["scalars"].pop(f"writer_G_{part}") for part in ("mean", "ctr"))
        ratio = [m / c for m, c in zip(mean["v"], centred["v"], strict=True)]
        data["scalars"]["writer_ratio"] = {"s": mean["s"], "v": ratio}

    _, guard = verdict(changed(trace(tmp_path, collapse()), change))
    assert "G_mean/G_ctr" in " ".join(guard.first[TRIP][1]) and LOCKED not in guard.first
    assert any("(writer_G_ctr): in no line; LOCKED cannot be told" in m for m in guard.missing())


def test_nothing_stands_in_for_a_value_that_is_missing_once(tmp_path):
    """A line without G_ctr is not judged by the gradient of W_Q, which is another size."""

    def change(data):
        G = data["scalars"]["writer_G_ctr"]
        data["scalars"]["deep_Q"] = {"s": G["s"], "v": [1e-6] * len(G["v"])}
        for part in (G, data["scalars"]["writer_G_mean"]):
            part["v"][90:] = [None] * len(part["v"][90:])
        data["layerwise"]["tcs"]["99"]["v"][70:] = [0.99] * 49
        data["layerwise"]["tcs"]["75"]["v"][70:] = [0.99] * 49
        G["v"][70:90] = [0.003] * 20

    _, guard = verdict(changed(trace(tmp_path, collapse()), change))
    assert LOCKED not in guard.first and not any("stands in" in text for text in guard.missing())


def test_one_sample_of_the_last_block_is_not_two(tmp_path):
    """Where other layers are sampled more often than it is."""

    def change(data):
        data["scalars"]["writer_G_ctr"]["v"][60:] = [1e-5] * 59
        tcs = data["layerwise"]["tcs"]
        tcs["75"]["v"] = [0.99] * 119
        tcs["99"] = {"s": list(range(1, 120, 10)), "v": [0.5] * 9 + [0.99] + [0.5] * 2}

    _, guard = verdict(changed(trace(tmp_path, collapse()), change))
    assert LOCKED not in guard.first
    assert "TCS of the last block (tcs): in 12 of 119 lines" in guard.missing()


def test_of_two_names_for_one_metric_the_better_is_taken_and_told(tmp_path):
    def change(data):
        scalars = data["scalars"]
        raw, rho = scalars["grad_norm"], data["layerwise"].pop("rho")["99"]
        scalars["grad_norm_raw"] = {"s": raw["s"], "v": list(raw["v"])}
        scalars["grad_norm"] = {"s": raw["s"], "v": [1.0] * len(raw["s"])}  # clipped
        for stage, factor in ((10, 0.1), (79, 1.0), (30, 0.2)):
            values = [factor * v for v in rho["v"]]
            scalars[f"rho_stage{stage}_img"] = {"s": rho["s"], "v": values}
        scalars["step"] = scalars["layerwise"] = {"s": [1, 2], "v": [0.1, None]}

    seen, guard = verdict(changed(trace(tmp_path, collapse()), change))
    text = " ".join(guard.first[TRIP][1])
    assert "gradient norm 8 >" in text and "rho 5 >" in text
    assert "grad_norm and grad_norm_raw are both grad_norm; grad_norm_raw is taken" in seen.notes
    assert any("rho_stage30_img are both rho; rho_stage79_img is taken" in n for n in seen.notes)
    assert "step is no name of a metric; left out" in seen.notes


def test_lines_that_become_dense_make_no_gaps_of_those_before(tmp_path):
    rows = [r for r in collapse(steps=700, onset=650) if r["step"] % 10 == 0 or r["step"] > 590]
    assert load(trace(tmp_path, rows)).notes == []


def test_gaps_and_nan_are_named(tmp_path):
    def harm(data):
        loss, tcs = data["scalars"]["loss"], data["layerwise"]["tcs"]["99"]
        loss["v"][10:15] = [math.nan] * 5
        tcs["v"][20] = None
        for table in (data["scalars"], *data["layerwise"].values()):
            for series in table.values():
                for part in ("s", "v"):
                    del series[part][40:60]

    seen, guard = verdict(changed(trace(tmp_path, collapse()), harm))
    assert "loss: 5 of 99 values are no numbers" in seen.notes
    assert "tcs of layer 99: 1 of 99 values are no numbers" in seen.notes
    assert "no line between steps 40 and 61" in seen.notes
    assert "loss: in 94 of 99 lines" in guard.missing()
    assert {TRIP, LOCKED} <= set(guard.first)


def test_lines_of_a_run_that_cannot_be_read_are_counted(tmp_path):
    lines = [json.dumps(row) for row in collapse()]
    lines[3], lines[7], lines[9] = lines[3][:20], '{"step": Infinity}', "[1]"
    lines.insert(30, lines[30])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    seen, guard = verdict(tmp_path)
    assert "3 of 119 lines cannot be read" in seen.notes
    assert "step 31 is there twice; the later line counts" in seen.notes
    assert any("the depth is not told; 100" in note for note in seen.notes)
    assert LOCKED in guard.first


def harmed(data, chance):
    """Any damage that leaves JSON: values, steps, series, layers, whole parts."""
    for part in ("scalars", "layerwise"):
        for name in list(data[part]):
            if chance.random() < 0.15:
                del data[part][name]
    tables = [data["scalars"], *data["layerwise"].values()]
    for table in tables:
        for name in list(table):
            series = table[name]
            if chance.random() < 0.3:
                keep = sorted(chance.sample(range(len(series["s"])), chance.randrange(1, 60)))
                series.update({k: [series[k][i] for i in keep] for k in ("s", "v")})
            for i in range(len(series["v"])):
                if chance.random() < 0.05:
                    odd = [None, math.nan, math.inf, -math.inf, 0.0, -1.0, "x", True, [], 1e300]
                    series["v"][i] = chance.choice(odd)
                if chance.random() < 0.02:
                    series["s"][i] = chance.choice([None, 5, -3, 1e6, "7", "x", math.inf])
            if chance.random() < 0.05:
                table[name] = chance.choice([None, {}, {"s": [1]}, [], {"s": [1, 2], "v": [1]}])
            if chance.random() < 0.1:
                table[chance.choice(["3", "x", "-1", ""])] = table.pop(name)


def test_no_damage_crashes_a_replay(tmp_path):
    from model.config import UsageError
    from model.stability.replay import findings, report

    told = 0
    for seed in range(150):
        path = trace(tmp_path, collapse())
        changed(path, lambda data, seed=seed: harmed(data, random.Random(seed)))
        try:
            seen, guard = verdict(path)
        except UsageError as error:
            assert "holds no line of a step" in str(error)
            continue
        text = list(report(findings(seen, guard)))
        json.dumps(guard.dump(), allow_nan=False)
        told += "Verdict: " in text[0]
    assert told > 140


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a trace must be JSON"),
        ("[1]", "a trace must be JSON"),
        ('{"scalars": [], "layerwise": 3}', "a trace must be JSON"),
        ("{}", "holds no line of a step"),
        ('{"scalars": {"loss": {"s": [], "v": []}}}', "holds no line of a step"),
    ],
)
def test_what_is_no_trace_is_one_error(tmp_path, text, message):
    from model.config import UsageError

    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "trace.json")
    with pytest.raises(UsageError, match="neither metrics.jsonl nor trace.json"):
        load(tmp_path.parent)
    with pytest.raises(UsageError, match="cannot read the trace"):
        load(tmp_path / "none.json")
