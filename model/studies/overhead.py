"""What the taps cost: steps with them and without, taken in turn."""

import statistics
import time

from model.config import CONTENDERS, preset
from model.data import open_dataset
from model.nn.dit import build
from model.stability.taps import MAPS_EVERY, Recorder
from model.studies.base import Study
from model.train.optim import make_optimizer
from model.train.step import draw_batch, gradient_norms, gradients, prepare, update

STEPS = 50
WARM = 2  # steps that are not timed
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Overhead(Study):
    blocks = (400,)

    def run(self, out, blocks, seeds, steps, show):
        steps, blocks = max(steps or STEPS, MAPS_EVERY), blocks or self.blocks
        jobs = [(n, name) for n in blocks for name in CONTENDERS]
        rows = []
        for number, (n, name) in enumerate(jobs):
            config = preset(f"collapse{n}", **CONTENDERS[name], device="cpu")
            before = number * (steps + WARM)
            times = measure(
                config, steps, lambda i, b=before: show(b + i, len(jobs) * (steps + WARM))
            )
            rows.append(
                {"run": f"{name}-{n}", "blocks": n, "residual": name, "steps": steps, **times}
            )
        return {"rows": rows}

    def conclusions(self, results):
        shares = [row["cpu_ratio"] - 1 for row in results["rows"]]
        yield (
            f"taps on four blocks, every step: {min(shares):.1%} to {max(shares):.1%} of a step's "
            "CPU time, by medians"
        )


def measure(config, steps, show):
    """Milliseconds of a step without taps, with taps, and with attention's maps too; by clock.

    ratio   of MAPS_EVERY steps, the maps in one of them, to as many without taps
    """
    device, dataset = prepare(config), open_dataset(config)
    runs = [_Run(config, device, probes) for probes in (False, True)]
    times = {clock: ([], []) for clock in CLOCKS}
    for step in range(WARM + steps):
        batch = draw_batch(config, dataset, step)
        for i in (0, 1) if step % 2 else (1, 0):
            start = {clock: now() for clock, now in CLOCKS.items()}
            runs[i].step(step, batch)
            for clock, now in CLOCKS.items():
                times[clock][i].append(now() - start[clock])
        show(step + 1)
    row = {}
    for clock, pair in times.items():
        off, on = (seconds[WARM:] for seconds in pair)
        maps = [t for i, t in enumerate(on, WARM + 1) if i % MAPS_EVERY == 0]
        plain = [t for i, t in enumerate(on, WARM + 1) if i % MAPS_EVERY]
        off, plain, maps = (1e3 * statistics.median(t) for t in (off, plain, maps))
        group = (MAPS_EVERY - 1) * plain + maps
        row[f"{clock}_ms"], row[f"{clock}_tapped"], row[f"{clock}_maps"] = off, plain, maps
        row[f"{clock}_ratio"] = group / (MAPS_EVERY * off)
    return row


class _Run:
    """A model in training."""

    def __init__(self, config, device, probes):
        self._config, self._device = config, device
        self._model = build(config, device)
        self._optimizer = make_optimizer(self._model, config)
        self._recorder = Recorder(self._model, self._optimizer, probes, config.log_every)

    def step(self, step, batch):
        """One update; what was measured is read, as a guard does."""
        self._recorder.begin(step + 1)
        loss, quarters = gradients(self._config, self._model, batch, self._device)
        norms = gradient_norms(self._optimizer)
        self._recorder.record(step + 1, loss, norms, quarters)
        self._recorder.rows()
        update(self._config, step, self._optimizer, norms.norm())
