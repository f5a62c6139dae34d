"""Study of the cost of the taps: steps with and without them, timed alternately."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from model.config import CONTENDERS, Config, preset
from model.data import open_dataset
from model.nn.dit import build
from model.stability.taps import MAPS_EVERY, Recorder
from model.studies.base import Progress, Results, Study
from model.train.optim import make_optimizer
from model.train.step import (
    Batch,
    compute_gradients,
    draw_batch,
    gradient_norms,
    prepare,
    update,
)

TIMED_STEPS = 50
WARM_UP_STEPS = 2  # not timed
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Overhead(Study):
    """Times of steps with taps on four blocks, relative to steps without."""

    blocks = (400,)

    def run(
        self,
        out: Path,
        blocks: Sequence[int] | None,
        seeds: int | None,
        steps: int | None,
        show: Progress,
    ) -> Results:
        steps, blocks = max(steps or TIMED_STEPS, MAPS_EVERY), blocks or self.blocks
        jobs = [(n, name) for n in blocks for name in CONTENDERS]
        steps_of_job = steps + WARM_UP_STEPS
        rows = []
        for number, (n, name) in enumerate(jobs):

            def show_steps(i: int, before: int = number * steps_of_job) -> None:
                show(before + i, len(jobs) * steps_of_job)

            config = preset(f"collapse{n}", **CONTENDERS[name], device="cpu")
            times = time_steps(config, steps, show_steps)
            rows.append(
                {"run": f"{name}-{n}", "blocks": n, "residual": name, "steps": steps, **times}
            )
        return {"rows": rows}

    def conclusions(self, results: Results) -> Iterator[str]:
        shares = [row["cpu_ratio"] - 1 for row in results["rows"]]
        yield (
            f"taps on four blocks in every step add {min(shares):.1%} to {max(shares):.1%} to the "
            "median CPU time of a step"
        )


def time_steps(config: Config, steps: int, show: Callable[[int], None]) -> dict[str, float]:
    """Return the median milliseconds of a step, by clock (wall, cpu).

    CLOCK_ms      without taps
    CLOCK_tapped  with taps, without attention's maps
    CLOCK_maps    with taps and attention's maps
    CLOCK_ratio   MAPS_EVERY steps with taps, one of them with maps, to as many without taps
    """
    device, dataset = prepare(config), open_dataset(config)
    runs = [_Training(config, device, probes) for probes in (False, True)]
    times: dict[str, tuple[list[float], list[float]]] = {clock: ([], []) for clock in CLOCKS}
    for step in range(WARM_UP_STEPS + steps):
        batch = draw_batch(config, dataset, step)
        for i in (0, 1) if step % 2 else (1, 0):
            start = {clock: now() for clock, now in CLOCKS.items()}
            runs[i].step(step, batch)
            for clock, now in CLOCKS.items():
                times[clock][i].append(now() - start[clock])
        show(step + 1)
    row = {}
    for clock, pair in times.items():
        without, tapped = (seconds[WARM_UP_STEPS:] for seconds in pair)
        numbered = list(enumerate(tapped, WARM_UP_STEPS + 1))
        off, plain, maps = (
            1e3 * statistics.median(seconds)
            for seconds in (
                without,
                [t for i, t in numbered if i % MAPS_EVERY],
                [t for i, t in numbered if i % MAPS_EVERY == 0],
            )
        )
        group = (MAPS_EVERY - 1) * plain + maps
        row[f"{clock}_ms"], row[f"{clock}_tapped"], row[f"{clock}_maps"] = off, plain, maps
        row[f"{clock}_ratio"] = group / (MAPS_EVERY * off)
    return row


class _Training:
    """A model in training, with or without probes."""

    def __init__(self, config: Config, device: str, probes: bool) -> None:
        self._config, self._device = config, device
        self._model = build(config, device)
        self._optimizer = make_optimizer(self._model, config)
        self._recorder = Recorder(self._model, self._optimizer, probes, config.log_every)

    def step(self, step: int, batch: Batch) -> None:
        """Take one update and copy the metrics to the host, as a guard does."""
        self._recorder.begin(step + 1)
        loss, quarters = compute_gradients(self._config, self._model, batch, self._device)
        norms = gradient_norms(self._optimizer)
        self._recorder.record(step + 1, loss, norms, quarters)
        self._recorder.rows()
        update(self._config, step, self._optimizer, norms.norm())
