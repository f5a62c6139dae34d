"""The description of a machine in a record, and its peak rates."""

import json
import subprocess
import sys
import types

import pytest
import torch

from bench.__main__ import main
from bench.cases import Shape
from bench.common import machine, options
from bench.common.records import ROOT


def test_a_run_has_date_commit_software_and_shape():
    run = machine.describe_run(Shape(segments=(5, 3), dtype=torch.float16))
    assert {"date", "commit", "torch", "triton", "python", "shape"} <= set(run)
    assert run["shape"]["dtype"] == "float16" and run["shape"]["segments"] == [5, 3]
    assert json.loads(json.dumps(run)) == run


def test_the_version_of_triton_is_read_without_an_import():
    """An import decides whether Triton interprets its kernels in this process."""
    code = "import sys; from bench.common import machine; machine.describe_run()"
    code += "; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_command_imports_triton_before_it_runs():
    code = "import sys, bench.__main__ as m; m.make_parser(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_cpu_is_described():
    described = machine.describe_machine("cpu", "cpu")
    assert described["device"] and described["instruction_set"]
    assert "capability" not in described
    assert machine.describe_machine("cpu", "reference")["instruction_set"] is None


@pytest.fixture
def gpu(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234-ab")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties)


def test_a_gpu_is_described_with_its_driver_and_clocks(gpu, monkeypatch):
    commands = []

    def smi(command, **options):
        commands.append(command)
        return types.SimpleNamespace(stdout="580.159.03, 1980, 3201, 1980\n")

    monkeypatch.setattr(subprocess, "run", smi)
    described = machine.describe_machine("cuda:1")
    assert described["device"] == "NVIDIA H200" and described["capability"] == [9, 0]
    assert described["driver"] == "580.159.03"
    assert described["clocks"] == {"sm": "1980", "memory": "3201", "sm_max": "1980"}
    assert "--id=GPU-1234-ab" in commands[0]


def test_without_nvidia_smi_driver_and_clocks_are_unknown(gpu, monkeypatch):
    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    described = machine.describe_machine("cuda")
    assert described["driver"] is None and described["clocks"] is None


def test_rates_are_positive():
    assert machine.measure_copy("cpu", megabytes=4, repeats=3) > 1e6
    assert machine.measure_matmul("cpu", torch.float32, size=64, repeats=3) > 1e6


def test_the_command_prints_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "measure_copy", lambda device, megabytes: 4e12)
    monkeypatch.setattr(machine, "measure_matmul", lambda device, dtype: 8e14)
    file = tmp_path / "m.jsonl"
    assert main(["machine", "--device", "cpu", "--dtype", "fp16", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "4,000.0 GB/s" in shown and "800 TFLOP/s in float16" in shown
    record = json.loads(file.read_text())
    assert record["kind"] == "machine" and record["matmul_flops_per_second"] == 8e14


def test_a_numbered_gpu_becomes_the_current_device(monkeypatch):
    """Streams and graphs are made on the current device."""
    current = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    args = types.SimpleNamespace(device="cuda:1", threads=None)
    assert options.select_device(args) == "cuda:1" and current == ["cuda:1"]
