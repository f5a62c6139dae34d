"""The guard on made lines: what each state needs, and what is no evidence of it."""

import json
import random

import pytest

from model.stability.guard import CALM, LOCKED, QUIET, TRIP, WATCH, WINDOW, Guard, Series
from tests.model.sample_traces import COLLAPSED, COLLAPSING, DEPTH, line


def after(*changes, healthy=60, step=1):
    """A guard that saw healthy lines and then these; and its states after them."""
    guard, noise = Guard(DEPTH), random.Random(0)
    for n in range(healthy):
        guard.observe(line(step + n, noise))
        assert guard.state == QUIET
    states = [guard.observe(line(step + healthy + i, **c)) for i, c in enumerate(changes)]
    return guard, states


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
