"""The structure of the checkout: imports, names, files that belong together, README files."""

import ast
import inspect
import re
import shlex

import pytest
import torch

import mvsplit_ops as mv
from bench import __main__ as bench_commands
from bench.cases import CASES, PROFILE, calls_per_step
from model import options as model_options
from mvsplit_ops import __main__ as library_commands
from mvsplit_ops import _backends, reference
from tests.import_graph import ROOT, import_graph, read_sources, shared_names, structural_faults

SOURCES = read_sources()


def test_imports_form_no_circle_and_never_point_upward():
    assert structural_faults(SOURCES) == []


PLANTED = [
    # (module, import that is added to it, part of the reported fault)
    (
        "bench.common.records",
        "from bench.report import write",
        "bench.report.write, which is above",
    ),
    ("bench.static.traffic", "import tests.op_suite", "tests.op_suite, which is above"),
    ("model.nn.flow", "from model.train.loop import train", "model.train.loop, which is above"),
    ("mvsplit_ops.reference", "import mvsplit_ops as mv", "mvsplit_ops.__init__, which is above"),
    ("model.config", "import bench.cases", "bench.cases, which is above"),
    ("model.rng", "from model import config", "import circle: "),
    ("bench.common.timing", "from bench.common import machine", "import circle: "),
    (
        "mvsplit_ops._cuda.swiglu",
        "from mvsplit_ops.triton_kernels import swiglu",
        "mvsplit_ops._cuda.swiglu imports mvsplit_ops.triton_kernels.swiglu: a backend may",
    ),
    (
        "mvsplit_ops.triton_kernels.rope",
        "import importlib; importlib.import_module('mvsplit_ops._cuda.heads')",
        "mvsplit_ops.triton_kernels.rope imports mvsplit_ops._cuda.heads: a backend may",
    ),
]


@pytest.mark.parametrize(("module", "statement", "fault"), PLANTED)
def test_a_planted_import_inside_a_function_is_found(module, statement, fault):
    planted = f"{SOURCES[module]}\n\ndef planted():\n    {statement}\n"
    if module == "model.rng":  # config itself imports nothing of the model: close the circle
        returning = f"{SOURCES['model.config']}\n\ndef planted():\n    from model import rng\n"
        sources = {**SOURCES, module: planted, "model.config": returning}
    else:
        sources = {**SOURCES, module: planted}
    assert any(fault in line for line in structural_faults(sources))


def test_imports_resolve_to_the_modules_they_name():
    graph = import_graph(
        {
            "a.__init__": "from a.b import value",
            "a.b": "from a import c, value\nimport a.d.e\nimport torch",
            "a.c": "def late():\n    from .d import e, other",
            "a.d.__init__": "",
            "a.d.e": "",
        }
    )
    assert graph == {
        "a.__init__": {"a.b"},
        "a.b": {"a.c", "a.__init__", "a.d.e"},
        "a.c": {"a.d.e", "a.d.__init__"},
        "a.d.__init__": set(),
        "a.d.e": set(),
    }


@pytest.mark.parametrize("package", ["mvsplit_ops", "model", "bench"])
def test_public_classes_and_constants_have_unique_names(package):
    assert shared_names(SOURCES, package) == {}


def test_private_pytorch_api_is_used_in_one_file_only():
    users = [name for name, source in SOURCES.items() if re.search(r"\btorch\._C\b", source)]
    assert [name for name in users if not name.startswith("tests.")] == ["mvsplit_ops._register"]


def test_no_module_changes_the_import_system():
    """setup.py and bench import modules by their names, from where they are installed."""
    sources = {name: s for name, s in SOURCES.items() if not name.startswith("tests.")}
    sources["setup.py"] = (ROOT / "setup.py").read_text()
    change = re.compile(
        r"sys\.(path|meta_path|path_hooks)\b|sys\.modules(\[.*\] *=|\.(pop|update|set))"
    )
    assert [name for name, source in sources.items() if change.search(source)] == []


def test_the_version_is_written_in_one_place():
    version = re.escape(mv.__version__)
    places = [ROOT / name for name in ("setup.py", "pyproject.toml", "CITATION.cff")]
    places += (ROOT / "mvsplit_ops").glob("*.py")
    defining = re.compile(rf"^_*version_*\s*[=:]\s*[\"']?{version}\b", re.M)
    defining_files = [path.name for path in places if defining.search(path.read_text())]
    assert defining_files == ["_version.py"]


def test_triton_kernels_do_not_use_autograd_or_registration():
    for name, source in SOURCES.items():
        if name.startswith("mvsplit_ops.triton_kernels."):
            used = {
                ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)
            }
            assert not used & {"torch.library", "torch.autograd", "torch.ops"}, name


@pytest.mark.parametrize("op", _backends.OPS)
def test_an_operator_has_the_same_stem_everywhere(op):
    files = f"csrc/cpu/{op}.cpp", f"mvsplit_ops/{op}.py", f"triton_kernels/{op}.py"
    for path in (*files, f"tests/ops/test_{op}.py"):
        assert (ROOT / path).is_file(), path
    assert callable(getattr(reference, op)) and callable(getattr(mv, op)) and op in mv.__all__
    for name in (op, f"{op}_fwd", f"{op}_bwd"):
        assert hasattr(torch.ops.mvsplit, name)
    assert op in {case.op for case in CASES}


def test_every_kernel_file_belongs_to_an_operator():
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
    """The only exception is the variable that switches Triton's interpreter on."""
    names = re.compile(r"\b(os\.environ(?!\[\"TRITON_INTERPRET\"\])|os\.getenv|getenv\()")
    for folder in ("mvsplit_ops", "triton_kernels", "model", "bench", "csrc"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert not names.search(path.read_text()), path
    assert not names.search((ROOT / "setup.py").read_text())


def test_public_signatures_agree_with_their_schemas():
    for op in _backends.OPS:
        schema = getattr(torch.ops.mvsplit, op).default._schema
        parameters = inspect.signature(getattr(mv, op)).parameters.values()
        assert [a.name for a in schema.arguments] == [p.name for p in parameters]
        for argument, parameter in zip(schema.arguments, parameters, strict=True):
            assert argument.kwarg_only == (parameter.kind == parameter.KEYWORD_ONLY)
            if argument.has_default_value():
                assert argument.default_value == parameter.default


PAGES = sorted(p for p in ROOT.glob("**/*.md") if ".venv" not in p.parts and "build" not in p.parts)
GUIDES = [p for p in PAGES if p.name in ("README.md", "CONTRIBUTING.md")]


def page_name(path):
    return str(path.relative_to(ROOT))


def shell_commands(page):
    """The commands of a page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_shows_the_two_commands():
    used = [command[1] for command in shell_commands(ROOT / "README.md") if command[:1] == ["make"]]
    assert used == ["profile", "test"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_commands_of_the_guides_exist(page):
    """Every `make` target is defined, and every command line of the packages parses."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    parsers = {
        "bench": bench_commands.make_parser(),
        "model": model_options.make_parser(""),
        "mvsplit_ops": library_commands.make_parser(),
    }
    for command in shell_commands(page):
        if command[:1] == ["make"]:
            assert command[1] in targets, command
        if command[:2] == ["python", "-m"] and command[2] in parsers:
            parsers[command[2]].parse_args(command[3:])


def test_the_layout_in_the_readme_names_folders():
    tree = (ROOT / "README.md").read_text().split("## Layout")[1].split("```")[1]
    for name in re.findall(r"^(\S+)", tree, re.M):
        assert (ROOT / name).is_dir(), name


EXAMPLES = [
    (page, example)
    for page in GUIDES
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    if example.startswith("import ")  # others are parts of a file
]


def test_the_readme_has_one_example():
    assert [page for page, _ in EXAMPLES if page == ROOT / "README.md"] == [ROOT / "README.md"]


@pytest.mark.parametrize(
    ("page", "example"), EXAMPLES, ids=lambda value: getattr(value, "name", "")
)
def test_python_examples_run(page, example):
    exec(compile(example, str(page), "exec"), {})
