"""What the records of a folder say: the newest of each, operators compared, and the fastest."""

from dataclasses import dataclass, replace
from pathlib import Path

from bench.cases import CASES, PROFILE, calls_per_step
from bench.common import records, text_tables
from bench.measure.profile import OperatorTiming, Profile
from mvsplit_ops import _backends

OURS = ("cpu", "triton", "cuda")
BLOCKS = 400  # calls of a step weigh forward against backward: the paper's depth
CASE = {case.op: case for case in CASES}
STEP = {case.op for case in PROFILE if case.part_of is None}

# What a record of a kind must have beside "run"; other kinds are named and not shown.
NEEDED = {
    "profile": ("rows", "copy_bytes_per_second"),
    "ops": ("op", "title", "must_move", "copy_bytes_per_second", "columns", "missing"),
    "in_loop": ("rows", "step_ms"),
    "step": ("rows",),
    "traffic": ("rows", "missing"),
    "machine": ("copy_bytes_per_second", "matmul_flops_per_second", "matmul_dtype"),
    "resources": ("rows", "missing"),
}
OF_OPERATORS = ("profile", "ops", "in_loop", "traffic")


@dataclass(frozen=True)
class SourcedRecord:
    """A record and the name of its file."""

    file: str
    record: dict

    @property
    def kind(self):
        return self.record["kind"]

    @property
    def run(self):
        return self.record["run"]

    @property
    def device(self):
        """Its name; None where nothing was timed."""
        return self.run.get("device")

    @property
    def gpu(self):
        return "capability" in self.run

    @property
    def measured(self):
        """What a newer record replaces this one in."""
        return records.measurement_key(self.record)


def read(folder):
    """Every record of a folder's *.jsonl with its file, oldest first.

    ValueError: no such folder, no record in it, a line is no record, or a record lacks something.
    """
    if not records.read_folder(folder):
        names = ", ".join(sorted(p.name for p in Path(folder).iterdir())) or "nothing"
        raise ValueError(
            f"no records in {folder}, which holds {names}; "
            f"python -m bench profile --json {Path(folder) / 'profile.jsonl'} makes one"
        )
    found = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        found += [_checked(SourcedRecord(path.name, record)) for record in records.read(path)]
    return sorted(found, key=lambda f: f.run["date"])


def _checked(found):
    lacks = [name for name in NEEDED.get(found.kind, ()) if name not in found.record]
    if lacks:
        raise ValueError(
            f"{found.file}: the {found.kind} record of {found.run['date']} lacks "
            f"{', '.join(lacks)}; delete its line"
        )
    named = [found.record] if found.kind == "ops" else found.record.get("rows", ())
    for op in (of["op"] for of in named if found.kind in OF_OPERATORS):
        if op not in CASE:
            raise ValueError(
                f"{found.file}: the {found.kind} record of {found.run['date']} is of {op!r}; "
                f"bench/cases.py has {', '.join(CASE)}; delete its line"
            )
    return found


def newest(found, kind):
    """The newest of each thing that was measured; of steps, those whose rows name what ran."""
    of_kind = [f for f in found if f.kind == kind and not _nameless(f)]
    kept = sorted({f.measured: f for f in of_kind}.values(), key=lambda f: f.run["date"])
    if kind == "ops":
        kept.sort(key=lambda f: (list(CASE).index(f.record["op"]), tokens(f.run["shape"])))
    return kept


def _nameless(found):
    """A step's record of the time when rows named a backend, and no implementation."""
    rows = found.record["rows"] if found.kind == "step" else ()
    return any("implementation" not in row for row in rows)


def tokens(shape):
    """Of a call: those of every sample."""
    return shape["B"] * sum(shape["segments"])


def origins(found):
    """A line for each file and state of a machine: file, date, commit, device, software."""
    dates = {}
    for f in found:
        dates.setdefault((f.file, _where(f.run)), []).append(f.run["date"])
    return [
        f"{file}, {min(of)}{f' to {max(of)}' if min(of) != max(of) else ''}, {where}"
        for (file, where), of in dates.items()
    ]


def _where(run):
    software = (f"{name} {run[name]}" for name in ("driver", "torch", "triton") if run.get(name))
    threads = f"threads {run['threads']}" if run.get("instruction_set") else None
    parts = f"commit {run['commit']}", run.get("device"), threads, *software
    return ", ".join(part for part in parts if part)


def failures(found, missing=True):
    """Lines: which implementations of ops records are wrong, or absent too, why, and where."""
    where = {}
    for f in found:
        for name, why in f.record["missing"].items() if missing else ():
            where.setdefault(f"{name}: {why}", []).append(f)
        for name, why in failed(f).items():
            where.setdefault(f"{name}: failed: {why}", []).append(f)
    return [
        line if len(of) == len(found) else f"{line} ({', '.join(_places(of, found))})"
        for line, of in where.items()
    ]


def _places(of, among):
    """What tells some ops records from the others: operator, size, or both."""
    ways = (
        lambda f: f.record["title"],
        lambda f: text_tables.size_text(f.run["shape"]),
    )
    telling = [way for way in ways if len(set(map(way, among))) > 1]
    return dict.fromkeys(" at ".join(way(f) for way in telling) for f in of)


def failed(found):
    """{implementation: why} of an ops record: of its own, or in the place of its column."""
    columns = found.record["columns"].items()
    inside = {name: column["failed"] for name, column in columns if "failed" in column}
    return {**inside, **found.record.get("failed", {})}


def timed(found):
    """{implementation: its column} of an ops record, without those that failed."""
    return {n: column for n, column in found.record["columns"].items() if "failed" not in column}


def by_widths(found):
    """Ops records of one device and one width together: {(device, widths): records}."""
    groups = {}
    for f in newest(found, "ops"):
        groups.setdefault((f.device, text_tables.width_text(f.run["shape"])), []).append(f)
    return groups


def profiles(found):
    """(Profile, its records): each newest profile; every device's ops at the largest shape.

    What a profile calls "fused" has its backend's name here.
    """
    made = [(_named(Profile.from_json(f.record)), [f]) for f in newest(found, "profile")]
    for group in by_widths(found).values():
        sizes = {}
        for f in group:
            sizes.setdefault(text_tables.size_text(f.run["shape"]), []).append(f)
        largest = max(sizes.values(), key=lambda of: (len(of), tokens(of[0].run["shape"])))
        copy = max(f.record["copy_bytes_per_second"] for f in largest)
        made.append((Profile(largest[-1].run, copy, [_row(f) for f in largest]), largest))
    return made


def _named(profile):
    names = {"fused": profile.run["backend"]}
    rows = [
        replace(row, seconds={names.get(n, n): pair for n, pair in row.seconds.items()})
        for row in profile.rows
    ]
    return replace(profile, rows=rows)


def _row(found):
    case, columns = CASE[found.record["op"]], timed(found)
    seconds = {name: tuple(column["seconds"][:2]) for name, column in columns.items()}
    calls = calls_per_step(case, BLOCKS)
    return OperatorTiming(
        case.op, case.title, case.part_of, *calls, seconds, tuple(found.record["must_move"])
    )


@dataclass(frozen=True)
class Headline:
    """Over the operators of a step: times faster than eager, than torch.compile, share of copy."""

    device: str
    backend: str
    eager: float
    compile: float | None
    copy: float
    found: list


def headlines(found):
    """One of each profile; of a device without one, of its ops records."""
    profiled = {f.device for f in found if f.kind == "profile"}
    made = []
    for profile, of in profiles(found):
        if of[0].kind == "profile" or of[0].device not in profiled:
            made += _headline(profile, of)
    return made


def _headline(profile, found):
    rows = [row for row in profile.rows if row.op in STEP]
    complete = {n for row in rows for n in row.seconds if all(n in r.seconds for r in rows)}
    if len(rows) < len(STEP):
        return []  # some operators are not a step
    ms = {name: sum(row.ms_per_step(name) for row in rows) for name in complete}
    ours = [name for name in OURS if name in ms]
    if not ours or "eager" not in ms:
        return []
    best = min(ours, key=ms.get)
    moved = sum(row.bytes_per_second(best) * row.ms_per_step(best) for row in rows) / ms[best]
    return [
        Headline(
            device=profile.run["device"],
            backend=best,
            eager=ms["eager"] / ms[best],
            compile=ms["compile"] / ms[best] if "compile" in ms else None,
            copy=moved / profile.copy_bytes_per_second,
            found=found,
        )
    ]


def fastest(found):
    """{(capability, op): (backend, file)} by the ops records of CUDA devices.

    Least time of a step's forward and backward calls, at the largest shape where triton and cuda
    both were tried; one whose result was wrong there is out.
    """
    choice = {}
    for f in newest(found, "ops"):  # the largest shape of an op comes last
        row = _row(f)
        right = [name for name in ("triton", "cuda") if name in row.seconds]
        tried = {"triton", "cuda"} <= {*right, *failed(f)}
        if f.gpu and row.op in _backends.OPS and tried and right:
            key = tuple(f.run["capability"]), row.op
            choice[key] = min(right, key=row.ms_per_step), f.file
    return choice


def disagreements(found, committed):
    """Lines: where _backends.FASTEST is not what the records say; all of it for committed ones."""
    says = dict.fromkeys(_backends.FASTEST, _backends.UNMEASURED) if committed else {}
    says |= fastest(found)
    return [
        f"mvsplit_ops/_backends.py: FASTEST[{key}] is {_backends.FASTEST.get(key)}; "
        f"the records say {value}"
        for key, value in says.items()
        if _backends.FASTEST.get(key) != value
    ]
