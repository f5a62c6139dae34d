"""The guard on artificial lines: what each state requires, and what is not evidence."""

import json
import random

import pytest

from model.stability.guard import CALM, LOCKED, QUIET, TRIP, WATCH, WINDOW, Guard, TrailingSamples
from tests.model.sample_traces import COLLAPSED, COLLAPSING, DEPTH, line


def observe(*changes, healthy=60, step=1):
    """Return a guard after healthy lines and then these lines, and its states after the latter."""
    guard, noise = Guard(DEPTH), random.Random(0)
    for n in range(healthy):
        guard.observe(line(step + n, noise))
        assert guard.state == QUIET
    states = [guard.observe(line(step + healthy + i, **c)) for i, c in enumerate(changes)]
    return guard, states


def test_a_collapse_passes_through_all_states():
    guard, states = observe(
        dict(grad_norm=0.3), dict(grad_norm=0.3), COLLAPSING, COLLAPSED, COLLAPSED
    )
    assert states == [QUIET, WATCH, TRIP, TRIP, LOCKED]
    assert {s: step for s, (step, _) in guard.first.items()} == {WATCH: 62, TRIP: 63, LOCKED: 65}
    assert guard.lead_steps == 3 and guard.describe_missing() == []
    text = " ".join(guard.first[TRIP][1])
    assert all(word in text for word in ("TCS 0.97", "rho 5 >", "G_mean/G_ctr 50", "loss 1.8"))
    assert "two consecutive samples" in guard.first[LOCKED][1][-1]


def test_a_single_gradient_burst_is_not_a_watch():
    guard, states = observe(dict(grad_norm=5.0), {}, dict(grad_norm=5.0), {})
    assert states == [QUIET] * 4 and not guard.first


@pytest.mark.parametrize(
    "changes",
    [
        dict(tcs=0.99, rho=7.0),  # only the trunk, as in healthy starts of MV-Split at 400 blocks
        dict(grad_norm=9.0, G_mean=0.1),  # only gradients
        dict(loss=1.9),
        dict(
            loss=0.8 * 1.1, grad_norm=2.0, G_mean=0.02
        ),  # a restart: loss +10 %, gradient norm x 20
    ],
)
def test_one_kind_of_evidence_is_not_a_trip(changes):
    _, states = observe(*[changes] * 5)
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
def test_two_kinds_of_evidence_are_a_trip(changes):
    assert observe(changes)[1] == [TRIP]


def test_a_ratio_below_mean_domination_is_not_evidence():
    """With MV-Split, G_mean / G_ctr starts near 0, so that 4 x its median means nothing."""
    _, states = observe(*[dict(tcs=0.99, G_mean=0.02)] * 3)  # 20 x its median, 6.7
    assert set(states) == {QUIET}


@pytest.mark.parametrize(
    "unmet", [dict(tcs=0.97), dict(shallow=0.94), dict(G_ctr=5e-5), dict(G_ctr=0.003)]
)
def test_locked_needs_every_condition(unmet):
    assert LOCKED not in observe(*[{**COLLAPSED, **unmet}] * 4)[1]


def test_locked_needs_two_consecutive_samples():
    recovering = {**COLLAPSED, "G_ctr": 0.001}
    _, states = observe(COLLAPSED, recovering, COLLAPSED, recovering, COLLAPSED, COLLAPSED)
    assert [s == LOCKED for s in states] == [False] * 5 + [True]


def test_locked_needs_no_history():
    assert observe({}, COLLAPSED, COLLAPSED, healthy=0)[1] == [QUIET, QUIET, LOCKED]


def test_a_restart_transient_is_not_a_trip():
    """Loss +10 % and gradient norm x 20 for 50 steps, at the start and in the middle of a trace."""
    restart = dict(loss=0.88, grad_norm=2.0, G_mean=0.004, tcs=0.6)
    start = [(n, restart if n <= 50 else {}) for n in range(1, 200)]
    middle = [(n, restart if 100 < n <= 150 else {}) for n in range(1, 300)]
    gap = [(n, {}) for n in range(1, 100)] + [(n + 5000, c) for n, c in start]
    for steps in (start, middle, gap):
        guard, noise = Guard(DEPTH), random.Random(1)
        for n, changes in steps:
            guard.observe(line(n, noise, **changes))
        assert TRIP not in guard.first and LOCKED not in guard.first


def test_the_guard_is_calm_again_some_steps_after_a_trip():
    guard, _ = observe(dict(tcs=0.95, loss=1.3))
    assert not guard.is_calm(61) and not guard.is_calm(61 + CALM) and guard.is_calm(62 + CALM)


def test_a_loaded_guard_continues_like_the_dumped_one():
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


def test_lead_steps_count_from_the_first_warning_in_the_window():
    def lead_steps(*trips, locked):
        guard = Guard(DEPTH)
        for n in range(1, locked + 1):
            collapsed = dict(COLLAPSED) if n >= locked - 1 else {}
            guard.observe(line(n, **(dict(tcs=0.95, loss=1.3) if n in trips else collapsed)))
        assert guard.first[LOCKED][0] == locked
        return guard.lead_steps

    assert lead_steps(100, 250, locked=421) == 171
    assert lead_steps(100, 250, 419, locked=421) == 171
    assert lead_steps(100, locked=300) == 200
    assert lead_steps(20, locked=500) == 1  # from the line before, which is a TRIP


def test_trailing_samples_cover_a_window_and_a_minimum_number():
    dense, sparse = TrailingSamples(), TrailingSamples()
    for step in range(1000):
        dense.add(step, float(step))
        sparse.add(100 * step, float(step))
    assert len(dense.samples) == WINDOW and dense.median() == 1000 - (WINDOW + 1) / 2
    assert len(sparse.samples) == 20
