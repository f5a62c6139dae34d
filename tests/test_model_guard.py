"""The guard on made traces: what each state needs, what is no evidence, what is missing."""

import json
import math
import random

import pytest

from model.guard import CALM, LOCKED, QUIET, TRIP, WATCH, WINDOW, Guard, Series
from model.trace import load, replay

DEPTH = 100
HEALTHY = dict(loss=0.8, grad_norm=0.1, rho=0.9, tcs=0.5, shallow=0.3, G_mean=0.001, G_ctr=0.003)


def line(step, noise=None, **changes):
    """A line of metrics; noise shakes every value by some percent."""
    v = {**HEALTHY, **changes}
    if noise:
        v = {k: x * math.exp(0.03 * noise.gauss(0, 1)) for k, x in v.items()}
    return {
        "step": step, "loss": v["loss"], "grad_norm": v["grad_norm"],
        "writer_G_mean": v["G_mean"], "writer_G_ctr": v["G_ctr"],
        "layerwise": {
            "tcs": {"75": v["shallow"], "99": v["tcs"]}, "rho": {"75": v["rho"], "99": v["rho"]},
        },
    }  # fmt: skip


def after(*changes, healthy=60, step=1):
    """A guard that saw healthy lines and then these; and its states after them."""
    guard, noise = Guard(DEPTH), random.Random(0)
    for n in range(healthy):
        guard.observe(line(step + n, noise))
        assert guard.state == QUIET
    states = [guard.observe(line(step + healthy + i, **c)) for i, c in enumerate(changes)]
    return guard, states


COLLAPSING = dict(tcs=0.97, shallow=0.9, rho=5.0, G_mean=0.1, G_ctr=0.002, grad_norm=8.0, loss=1.8)
COLLAPSED = dict(tcs=1.0, shallow=0.99, rho=400.0, G_mean=0.2, G_ctr=1e-5, grad_norm=3.0, loss=1.9)


def test_a_collapse_is_seen_in_order():
    guard, states = after(
        dict(grad_norm=0.3), dict(grad_norm=0.3), COLLAPSING, COLLAPSED, COLLAPSED
    )
    assert states == [QUIET, WATCH, TRIP, TRIP, LOCKED]
    assert {s: step for s, (step, _) in guard.first.items()} == {WATCH: 62, TRIP: 63, LOCKED: 65}
    assert guard.lead() == 3 and guard.missing() == []
    text = " ".join(guard.first[TRIP][1])
    assert all(word in text for word in ("TCS 0.97", "rho 5 >", "G_mean/G_ctr 50", "loss 1.8"))
    assert "twice running" in guard.first[LOCKED][1][-1]


def test_one_burst_of_the_gradient_is_nothing():
    guard, states = after(dict(grad_norm=5.0), {}, dict(grad_norm=5.0), {})
    assert states == [QUIET] * 4 and not guard.first


@pytest.mark.parametrize(
    "changes",
    [
        dict(tcs=0.99, rho=7.0),  # the trunk alone, as in healthy starts of MV-Split at 400 blocks
        dict(grad_norm=9.0, G_mean=0.1),  # gradients alone
        dict(loss=1.9),
        dict(loss=0.8 * 1.1, grad_norm=2.0, G_mean=0.02),  # a restart: loss +10 %, gradient 20 x
    ],
)
def test_evidence_of_one_kind_is_no_trip(changes):
    _, states = after(*[changes] * 5)
    assert TRIP not in states and LOCKED not in states


@pytest.mark.parametrize(
    "changes",
    [
        dict(tcs=0.95, loss=1.3),
        dict(rho=2.5, grad_norm=2.0),
        dict(tcs=0.95, G_mean=0.1),
        dict(loss=1.3, G_mean=0.1),
    ],
)
def test_evidence_of_two_kinds_is_a_trip(changes):
    assert after(changes)[1] == [TRIP]


def test_a_ratio_below_mean_domination_is_no_evidence():
    """G_mean / G_ctr starts near nothing where MV-Split does: 4 x that says nothing."""
    _, states = after(*[dict(tcs=0.99, G_mean=0.02)] * 3)  # 20 x its median, 6.7
    assert set(states) == {QUIET}


@pytest.mark.parametrize(
    "spared", [dict(tcs=0.97), dict(shallow=0.94), dict(G_ctr=5e-5), dict(G_ctr=0.003)]
)
def test_locked_needs_all_it_names(spared):
    assert LOCKED not in after(*[{**COLLAPSED, **spared}] * 4)[1]


def test_locked_needs_two_samples_running():
    recovering = {**COLLAPSED, "G_ctr": 0.001}
    _, states = after(COLLAPSED, recovering, COLLAPSED, recovering, COLLAPSED, COLLAPSED)
    assert [s == LOCKED for s in states] == [False] * 5 + [True]


def test_locked_at_the_very_start_needs_no_history():
    assert after({}, COLLAPSED, COLLAPSED, healthy=0)[1] == [QUIET, QUIET, LOCKED]


def test_a_restart_transient_is_no_trip():
    """Loss +10 %, gradient 20 x for 50 steps: at a trace's start, and in its middle."""
    restart = dict(loss=0.88, grad_norm=2.0, G_mean=0.004, tcs=0.6)
    start = [(n, restart if n <= 50 else {}) for n in range(1, 200)]
    middle = [(n, restart if 100 < n <= 150 else {}) for n in range(1, 300)]
    gap = [(n, {}) for n in range(1, 100)] + [(n + 5000, c) for n, c in start]
    for steps in (start, middle, gap):
        guard, noise = Guard(DEPTH), random.Random(1)
        for n, changes in steps:
            guard.observe(line(n, noise, **changes))
        assert TRIP not in guard.first and LOCKED not in guard.first


def test_it_is_calm_some_steps_after_a_trip():
    guard, _ = after(dict(tcs=0.95, loss=1.3))
    assert not guard.calm(61) and not guard.calm(61 + CALM) and guard.calm(62 + CALM)


def test_a_guard_goes_on_from_what_it_dumped():
    whole, noise = Guard(DEPTH), random.Random(2)
    lines = [line(n, noise) for n in range(1, 400)]
    lines += [line(400 + i, **c) for i, c in enumerate([COLLAPSING, COLLAPSED, COLLAPSED])]
    other = Guard(DEPTH)
    for i, row in enumerate(lines):
        assert whole.observe(row) == other.observe(row)
        if i % 57 == 0:
            state = json.loads(json.dumps(other.dump(), allow_nan=False))
            other = Guard(DEPTH)
            other.load(state)
    assert whole.dump() == other.dump() and LOCKED in other.first


def test_a_lead_is_from_the_first_warning_of_the_window():
    def steps(*trips, locked):
        guard = Guard(DEPTH)
        for n in range(1, locked + 1):
            collapsed = dict(COLLAPSED) if n >= locked - 1 else {}
            guard.observe(line(n, **(dict(tcs=0.95, loss=1.3) if n in trips else collapsed)))
        assert guard.first[LOCKED][0] == locked
        return guard.lead()

    assert steps(100, 250, locked=421) == 171
    assert steps(100, 250, 419, locked=421) == 171
    assert steps(100, locked=300) == 200
    assert steps(20, locked=500) == 1  # the line before it, a TRIP as any of a collapse


def test_a_median_is_of_the_last_steps_but_of_enough_samples():
    dense, sparse = Series(), Series()
    for step in range(1000):
        dense.add(step, float(step))
        sparse.add(100 * step, float(step))
    assert len(dense.samples) == WINDOW and dense.median() == 1000 - (WINDOW + 1) / 2
    assert len(sparse.samples) == 20


# Replays


def trace(folder, rows, **config):
    """A trace file of lines, written by hand as the format says."""
    scalars, layerwise = {}, {}
    for row in rows:
        for name in ("loss", "grad_norm", "writer_G_mean", "writer_G_ctr"):
            add(scalars, name, row["step"], row[name])
        for metric, table in row["layerwise"].items():
            for layer, value in table.items():
                add(layerwise.setdefault(metric, {}), layer, row["step"], value)
    path = folder / "trace.json"
    data = {"config": {"depth": DEPTH, **config}, "scalars": scalars, "layerwise": layerwise}
    path.write_text(json.dumps(data))
    return path


def add(table, name, step, value):
    series = table.setdefault(name, {"s": [], "v": []})
    series["s"].append(step)
    series["v"].append(value)


def collapse(steps=120, every=1, onset=80):
    noise, rows = random.Random(3), []
    for n in range(1, steps * every, every):
        changes = {} if n < onset * every else COLLAPSING if n < (onset + 3) * every else COLLAPSED
        rows.append(line(n, noise if n < onset * every else None, **changes))
    return rows


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
    from model.diagnose import findings, report

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
