"""The import graph of the checkout, read from the source files, and the rules that it must obey.

Every import statement counts, inside functions too, and so does a module named as a string in
`importlib.import_module("...")`. An import of a name resolves to the module that it is, or to the
package whose `__init__` defines it.
"""

import ast
import pathlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

ROOT = pathlib.Path(__file__).parent.parent

# Where the modules of each folder are imported from: triton_kernels is installed in mvsplit_ops.
FOLDERS = {
    "mvsplit_ops": "mvsplit_ops",
    "triton_kernels": "mvsplit_ops.triton_kernels",
    "model": "model",
    "bench": "bench",
    "tests": "tests",
}

# Packages, and the rooms of each, from the lowest floor to the highest: a module may import modules
# of its own floor and of lower ones. A room is a module or a folder directly inside the package.
PACKAGES = ("mvsplit_ops", "model", "bench", "tests")
OPERATORS = (
    *("rope", "qk_norm", "rope_qk_norm", "swiglu"),
    *("mvsplit_rmsnorm", "residual_rmsnorm"),
)
FLOORS = {
    "mvsplit_ops": (
        ("_version", "_host"),
        ("triton_kernels", "_cuda", "_C"),
        ("_check", "_batching", "reference", "_backends"),
        ("_register", "_tables"),
        OPERATORS,
        ("modules",),
        ("__init__",),
        ("__main__",),
    ),
    "model": (
        ("config", "rng"),
        ("options",),
        ("nn", "data"),
        ("stability", "evaluate"),
        ("train",),
        ("demo", "studies", "info"),
        ("__init__", "__main__"),
    ),
    "bench": (
        ("cases",),
        ("common",),
        ("measure",),
        ("static",),
        ("report",),
        ("__init__", "__main__"),
    ),
}
BACKENDS = ("mvsplit_ops.triton_kernels", "mvsplit_ops._cuda")
BELOW_BACKENDS = ("mvsplit_ops._host",)


def read_sources() -> dict[str, str]:
    """Return {module name: source} of every Python file of the packages."""
    sources = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            sources[".".join((package, *parts))] = path.read_text()
    return sources


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return {module: modules of `sources` that it imports}."""
    return {name: _imports(name, source, sources) for name, source in sources.items()}


def _imports(name: str, source: str, sources: dict[str, str]) -> set[str]:
    resolved = (_resolve(target, sources) for target in _imported_names(name, source))
    return {module for module in resolved if module not in (None, name)}


def _imported_names(name: str, source: str) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def _resolve(target: str, sources: dict[str, str]) -> str | None:
    """Return the module that an imported name is or is defined in; None: it is not ours."""
    while target:
        for module in (target, f"{target}.__init__"):
            if module in sources:
                return module
        target = target.rpartition(".")[0]
    return None


def structural_faults(sources: dict[str, str]) -> list[str]:
    """Return a line for each broken rule: circles, upward imports, backends that share code."""
    graph = import_graph(sources)
    faults = [
        fault
        for name, imported in sorted(graph.items())
        for module in sorted(imported)
        for fault in (_upward(name, module), _across_backends(name, module))
        if fault
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f"import circle: {' -> '.join(reversed(error.args[1]))}")
    return faults


def _upward(name: str, module: str) -> str | None:
    if _package(name) == _package(module):
        package = _package(name)
        if package not in FLOORS or _floor(name) >= _floor(module):
            return None
    elif PACKAGES.index(_package(name)) > PACKAGES.index(_package(module)):
        return None
    return f"{name} imports {module}, which is above it"


def _across_backends(name: str, module: str) -> str | None:
    own = [backend for backend in BACKENDS if name.startswith(f"{backend}.")]
    if not own or module.startswith((f"{own[0]}.", *BELOW_BACKENDS)):
        return None
    return f"{name} imports {module}: a backend may import only itself and _host"


def _package(name: str) -> str:
    return name.split(".")[0]


def _floor(name: str) -> int:
    package, room = name.split(".")[:2]
    for floor, rooms in enumerate(FLOORS[package]):
        if room in rooms:
            return floor
    raise AssertionError(f"{name}: add {room!r} to FLOORS[{package!r}] in tests/import_graph.py")


def shared_names(sources: dict[str, str], package: str) -> dict[str, list[str]]:
    """Return {class or constant: modules} of those that several modules of a package define."""
    modules: dict[str, list[str]] = {}
    for name, source in sources.items():
        if _package(name) == package:
            for defined in set(_defined_names(ast.parse(source))):
                modules.setdefault(defined, []).append(name)
    return {name: places for name, places in sorted(modules.items()) if len(places) > 1}


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if isinstance(node, ast.AnnAssign):
            targets = (node.target,)
        for target in targets:
            for leaf in ast.walk(target):
                if isinstance(leaf, ast.Name) and leaf.id.isupper() and leaf.id[0] != "_":
                    yield leaf.id
