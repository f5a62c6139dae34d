"""pytest bench --benchmark-only: it saves a run, and fails if a later one is slower."""

import json
import os
import subprocess
import sys

from bench.common.records import ROOT


def pytest_bench(store, *options):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", f"--benchmark-storage={store}"]
    command += ["-k", "residual_rmsnorm and cpu and backward", *options]
    # Variables of an xdist worker would disable the benchmark in its child processes.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_call_that_is_slower_than_the_saved_run_fails(tmp_path):
    saved = pytest_bench(tmp_path, "--benchmark-autosave")
    assert saved.returncode == 0, saved.stdout
    (file,) = tmp_path.rglob("*.json")
    record = json.loads(file.read_text())
    (call,) = record["benchmarks"]
    for factor, passes in ((1e6, True), (1e-6, False)):  # as if the saved run had taken that long
        call["stats"]["min"] *= factor
        file.write_text(json.dumps(record))
        compared = pytest_bench(tmp_path, "--benchmark-compare")
        call["stats"]["min"] /= factor
        assert (compared.returncode == 0) == passes, compared.stdout
        assert ("has regressed" in compared.stdout + compared.stderr) != passes


def test_every_backend_that_runs_here_is_timed_forward_and_backward():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("swiglu-cpu-forward", "swiglu-eager-backward", "mvsplit_rmsnorm-cpu-backward"):
        assert f"[{name}]" in output
