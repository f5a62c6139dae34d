"""What a record says of its machine, and what the machine can do at best."""

import json
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from bench.__main__ import main
from bench.cases import Shape
from bench.common import machine, options

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_record_says_when_of_what_commit_and_with_which_software():
    run = machine.describe_run(Shape(segments=(5, 3), dtype=torch.float16))
    assert {"date", "commit", "torch", "triton", "python", "shape"} <= set(run)
    assert run["shape"]["dtype"] == "float16" and run["shape"]["segments"] == [5, 3]
    assert json.loads(json.dumps(run)) == run


def test_the_version_of_triton_is_told_without_importing_it():
    """An import decides whether Triton interprets its kernels in this process."""
    code = "import sys, bench.common.machine as m; m.describe_run(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_command_imports_triton_before_it_runs():
    code = "import sys, bench.__main__ as m; m.parser(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_cpu_is_described():
    found = machine.describe_machine("cpu", "cpu")
    assert found["device"] and found["instruction_set"] and "capability" not in found
    assert machine.describe_machine("cpu", "reference")["instruction_set"] is None


@pytest.fixture
def gpu(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234-ab")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties)


def test_a_gpu_is_described_with_its_driver_and_clocks(gpu, monkeypatch):
    asked = []

    def smi(command, **options):
        asked.append(command)
        return types.SimpleNamespace(stdout="580.159.03, 1980, 3201, 1980\n")

    monkeypatch.setattr(subprocess, "run", smi)
    found = machine.describe_machine("cuda:1")
    assert found["device"] == "NVIDIA H200" and found["capability"] == [9, 0]
    assert found["driver"] == "580.159.03"
    assert found["clocks"] == {"sm": "1980", "memory": "3201", "sm_max": "1980"}
    assert "--id=GPU-1234-ab" in asked[0]


def test_without_nvidia_smi_driver_and_clocks_are_unknown(gpu, monkeypatch):
    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    found = machine.describe_machine("cuda")
    assert found["driver"] is None and found["clocks"] is None


def test_rates_are_positive():
    assert machine.copy_bandwidth("cpu", megabytes=4, repeats=3) > 1e6
    assert machine.matmul_rate("cpu", torch.float32, size=64, repeats=3) > 1e6


def test_the_command_prints_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device, megabytes: 4e12)
    monkeypatch.setattr(machine, "matmul_rate", lambda device, dtype: 8e14)
    file = tmp_path / "m.jsonl"
    assert main(["machine", "--device", "cpu", "--dtype", "fp16", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "4,000.0 GB/s" in shown and "800 TFLOP/s in float16" in shown
    record = json.loads(file.read_text())
    assert record["kind"] == "machine" and record["matmul_flops_per_second"] == 8e14


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    """Streams and graphs are made on it."""
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    args = types.SimpleNamespace(device="cuda:1", threads=None)
    assert options.device(args) == "cuda:1" and chosen == ["cuda:1"]
