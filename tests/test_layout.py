"""The architecture, as far as a test can hold it: who imports whom, which files belong together."""

import ast
import pathlib
import re
from graphlib import TopologicalSorter

import pytest
import torch

import mvsplit_ops as mv
from bench.cases import CASES, PROFILE, calls_per_step
from mvsplit_ops import _backends, reference

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("triton_kernels", "mvsplit_ops", "model", "bench")  # each may import those before it
LAYERS = ("reference", "_check", "_backends", "_register", *_backends.OPS, "modules")


def imports(path):
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module.removeprefix("mvsplit_ops.")
            # triton_kernels is installed as mvsplit_ops.triton_kernels: a layer of its own.
            module = module if module.startswith("triton_kernels") else node.module
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def python_files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package):
    above = (*PACKAGES[PACKAGES.index(package) + 1 :], "tests", "op_suite")
    for path in python_files(package):
        found = {name.split(".")[0] for name in imports(path)} & set(above)
        assert not found, f"{path} imports {found}"


def test_kernels_know_nothing_of_registration():
    for path in python_files("triton_kernels"):
        used = {
            ast.unparse(n)
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Attribute)
        }
        assert not used & {"torch.library", "torch.autograd", "torch.ops"}, path


def test_modules_of_the_library_have_layers_and_no_cycle():
    graph = {}
    for name in LAYERS:
        path = ROOT / "mvsplit_ops" / f"{name}.py"
        used = {m.split(".")[1] for m in imports(path) if m.startswith("mvsplit_ops.")}
        graph[name] = used & set(LAYERS)
    tuple(TopologicalSorter(graph).static_order())  # CycleError
    foundations = {"reference", "_check", "_backends", "_register"}
    for name in foundations:
        assert graph[name] <= foundations, name
    assert all("modules" not in used for used in graph.values())
    files = {p.stem for p in (ROOT / "mvsplit_ops").glob("*.py")}
    assert files == {*LAYERS, "__init__", "__main__"}


def test_the_cuda_backend_knows_tensors_and_nothing_above():
    """Its launchers stand where Triton's do: no registration, no reference, no public function."""
    for path in python_files("mvsplit_ops/_cuda"):
        used = {m.split(".")[1] for m in imports(path) if m.startswith("mvsplit_ops.")}
        assert used <= {"_cuda"}, path


@pytest.mark.parametrize("op", _backends.OPS)
def test_an_operator_has_the_same_stem_everywhere(op):
    files = f"csrc/cpu/{op}.cpp", f"mvsplit_ops/{op}.py", f"triton_kernels/{op}.py"
    for path in (*files, f"tests/test_{op}.py"):
        assert (ROOT / path).is_file(), path
    assert callable(getattr(reference, op)) and callable(getattr(mv, op)) and op in mv.__all__
    for name in (op, f"{op}_fwd", f"{op}_bwd"):
        assert hasattr(torch.ops.mvsplit, name)
    assert op in {case.op for case in CASES}


def test_no_stem_is_without_an_operator():
    stems = {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")} - {"table"}
    assert stems == set(_backends.OPS)
    # rope and qk_norm are modes of rope_qk_norm's kernel
    cuda = {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")}
    assert cuda == set(_backends.OPS) - {"rope", "qk_norm"}
    for p in (ROOT / "triton_kernels").glob("[!_]*.py"):
        assert p.stem in _backends.OPS, p


def test_recompute_cheap_ops_are_the_forward_kernels():
    names = {op.__name__ for op in mv.recompute_cheap_ops()}
    assert names == {f"{op}_fwd.default" for op in _backends.OPS}


def test_the_profile_is_the_papers():
    """400 blocks, three of four checkpointed: 700 forward and 400 backward, the merge twice."""
    calls = {case.op: calls_per_step(case, 400) for case in PROFILE}
    assert calls == {
        "rope": (700, 400),
        "qk_norm": (700, 400),
        "rope_qk_norm": (700, 400),
        "swiglu": (700, 400),
        "mvsplit_rmsnorm": (1400, 800),
    }


def test_no_file_is_configured_by_the_environment():
    """But for the switch by which Triton itself is told to interpret."""
    names = re.compile(r"\b(os\.environ(?!\[\"TRITON_INTERPRET\"\])|os\.getenv|getenv\()")
    for folder in (*PACKAGES, "csrc"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert not names.search(path.read_text()), path
    assert not names.search((ROOT / "setup.py").read_text())


def test_public_signatures_agree_with_their_schemas():
    import inspect

    for op in _backends.OPS:
        schema = getattr(torch.ops.mvsplit, op).default._schema
        parameters = inspect.signature(getattr(mv, op)).parameters.values()
        assert [a.name for a in schema.arguments] == [p.name for p in parameters]
        for argument, parameter in zip(schema.arguments, parameters, strict=True):
            assert argument.kwarg_only == (parameter.kind == parameter.KEYWORD_ONLY)
            if argument.has_default_value():
                assert argument.default_value == parameter.default


def test_readme_names_real_commands_and_files():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(re.findall(r"^make (\w+)", text, re.M))
    assert {"profile", "test"} <= used <= targets
    for module in re.findall(r"python -m (\w+)", text):
        if module not in ("pip", "pytest"):
            assert (ROOT / module / "__main__.py").is_file(), module
    tree = text.split("## Layout")[1].split("```")[1]
    for name in re.findall(r"^(\S+)", tree, re.M):
        assert (ROOT / name).exists(), name


def test_readme_example_runs():
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(example, "README.md", "exec"), {})
