"""Checkpoints of a run; a kill at any moment leaves the newest one complete.

    RUN/checkpoints/step-00000010/   meta.json, model-*.safetensors, adamw-*, average-*, guard.json
    RUN/checkpoints/latest           name of the newest complete checkpoint

A checkpoint is written to a folder with another name, synchronised and renamed. Then `latest` is
updated, and only then are old checkpoints deleted. meta.json has the size of every file, the
configuration and the fingerprint of the data.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import config as configuration
from model.config import FREE_ON_BRANCH, FREE_ON_RESUME, Config, UsageError
from model.nn.dit import DiT, build, drop_weights_of_ones
from model.stability.response import Unguarded
from model.train.optim import Average

CHECKPOINT_FORMAT = "mvsplit-checkpoint-1"
SHARD_BYTES = 4 << 30  # maximum size of a file, and of a copy from the device
LATEST = "latest"
GUARD = "guard.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's moments


@dataclass
class TrainingState:
    """The tensors of a run and what describes them. Imported weights have no data or optimizer."""

    config: Config
    fingerprint: str | None  # of the data
    model: DiT
    optimizer: torch.optim.Optimizer | None = None
    average: Average | None = None


@dataclass(frozen=True)
class CheckpointMeta:
    """The part of meta.json that is read back."""

    step: int
    config: Config
    data: str | None  # fingerprint
    commit: str | None  # git revision of the code
    updates: int  # of AdamW; fewer than steps if some were skipped


def save(run: str | Path, step: int, state: TrainingState, guard: Unguarded | None = None) -> Path:
    """Write RUN/checkpoints/step-N with the state after N steps; return the folder."""
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    final, partial = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}"
    partial.mkdir()
    files = {}
    for part, tensors in _parts(state).items():
        for path in _write_shards(partial, part, tensors):
            files[path.name] = path.stat().st_size
    guard_state = guard.on_save(step, final.name) if guard else None
    if guard_state:
        _write_text(partial / GUARD, json.dumps(guard_state))
        files[GUARD] = (partial / GUARD).stat().st_size
    meta = {
        "format": CHECKPOINT_FORMAT, "step": step, "config": dataclasses.asdict(state.config),
        "config_hash": state.config.hash, "data": state.fingerprint, "commit": read_commit(),
        "torch": torch.__version__, "updates": _count_updates(state.optimizer), "files": files,
    }  # fmt: skip
    _write_text(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
    _sync(partial)
    if final.exists():  # from an earlier attempt; never the one that `latest` names
        shutil.rmtree(final)
    os.rename(partial, final)
    point_to(final)
    _prune(folder, final, state.config.keep, guard.last_good_checkpoint if guard else None)
    return final


def _parts(state: TrainingState) -> dict[str, Mapping[str, Tensor]]:
    parts: dict[str, Mapping[str, Tensor]] = {"model": state.model.state_dict()}
    if state.optimizer is not None:
        parts["adamw"] = _moments(state.model, state.optimizer)
    if state.average is not None and state.average.tensors:
        parts["average"] = state.average.tensors
    return parts


def point_to(checkpoint: Path) -> None:
    """Make a checkpoint the one from which its run resumes."""
    folder = checkpoint.parent
    _write_text(folder / f".{LATEST}", checkpoint.name + "\n")
    os.replace(folder / f".{LATEST}", folder / LATEST)
    _sync(folder)


def find(path: str | Path) -> Path:
    """Return the checkpoint folder that a path names: itself, or the newest one of a run."""
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    pointer = path / "checkpoints" / LATEST
    if not pointer.is_file():
        raise UsageError(f"{path} is neither a run with a checkpoint nor a checkpoint")
    return pointer.parent / _read_pointer(pointer)


def newest_step(run: str | Path) -> int | None:
    """Return the step of the newest checkpoint of a run, or None."""
    pointer = Path(run) / "checkpoints" / LATEST
    return int(_read_pointer(pointer).split("-")[1]) if pointer.is_file() else None


def _read_pointer(pointer: Path) -> str:
    name = pointer.read_text().strip()
    if not re.fullmatch(r"step-\d+", name):
        raise UsageError(
            f"{pointer} must name a checkpoint in the same folder, got {name!r}"
            f"{_alternatives(pointer)}"
        )
    return name


def read_guard(checkpoint: Path) -> dict[str, Any] | None:
    """Return the state of the guard in a checkpoint, or None."""
    path = checkpoint / GUARD
    return json.loads(path.read_text()) if path.is_file() else None


def read_meta(folder: Path) -> CheckpointMeta:
    """Return the metadata of a checkpoint; UsageError if a file is missing or incomplete."""
    try:
        values = json.loads((folder / "meta.json").read_text())
        sizes = values["files"]
        meta = CheckpointMeta(
            step=values["step"], config=configuration.from_dict(values["config"]),
            data=values["data"], commit=values["commit"], updates=values["updates"],
        )  # fmt: skip
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{folder} is not a checkpoint: its meta.json cannot be read: {error}"
        ) from error
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            got = "no such file" if actual is None else f"{actual} bytes"
            raise UsageError(
                f"{folder / name}: expected {size} bytes, got {got}; the checkpoint is damaged"
                f"{_alternatives(folder)}"
            )
    return meta


def open_run(
    path: str | Path, device: str = "cpu", part: str = "model", **overrides: Any
) -> tuple[DiT, CheckpointMeta, Path]:
    """Return the model of a run or checkpoint, with overrides, its metadata and its folder.

    part   model, or average for the averaged weights
    """
    folder = find(path)
    meta = read_meta(folder)
    model = build(dataclasses.replace(meta.config, **overrides), device)
    load_model(folder, model, part)
    return model, meta, folder


def load_model(folder: Path, model: DiT, part: str = "model") -> None:
    """Load all parameters and buffers from a checkpoint; part: model or average."""
    tensors = _read_shards(folder, part)
    if part == "average":
        tensors = {**model.state_dict(), **tensors}
    load_strictly(model, tensors, folder)


def load_strictly(model: DiT, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict; UsageError if a tensor is missing, unknown or of another shape."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    try:
        tensors = drop_weights_of_ones(tensors)
    except RuntimeError as error:
        raise UsageError(f"{source}: {error}") from error
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        common = own.keys() & shapes.keys()
        faults = [
            f"{n} is {shapes[n]}, not {own[n]}" for n in own if n in common and shapes[n] != own[n]
        ]
        faults += [f"{n} is missing" for n in own if n not in common]
        faults += [f"{n} is not part of this model" for n in shapes if n not in common]
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UsageError(
            f"{source} does not fit the model ({model.config.residual}, depth "
            f"{model.config.depth}, width {model.config.dim}): {'; '.join(faults[:3])}{more}"
        ) from error


def restore(folder: Path, state: TrainingState, free: Collection[str] = FREE_ON_RESUME) -> int:
    """Load a checkpoint into the state of a run; return its step.

    free   the fields in which the configurations may differ
    """
    meta, model = read_meta(folder), state.model
    changed = configuration.differences(meta.config, state.config, ignored=free)
    if changed:
        name, (then, now) = next(iter(changed.items()))
        raise UsageError(
            f"{folder} was trained with {name}={then}, not {now} ({len(changed)} fields differ); "
            f"resume with its configuration, or start a new run with another --out, which may "
            f"change {', '.join(sorted(FREE_ON_BRANCH - FREE_ON_RESUME))}"
        )
    if meta.data not in (state.fingerprint, None):  # None: imported weights
        raise UsageError(
            f"{folder} was trained on {meta.data}, the present data are {state.fingerprint}; pass "
            "its data with --set data_path=FOLDER"
        )
    load_model(folder, model)
    if meta.updates and state.optimizer is not None:  # imported weights have no updates
        moments = _read_shards(folder, "adamw")
        _restore_moments(model, state.optimizer, moments, meta.updates, folder)
    if state.average is not None:
        state.average.restart()  # imported weights have no average
        if state.average.tensors and meta.updates:
            for name, tensor in _read_shards(folder, "average").items():
                state.average.tensors[name].copy_(tensor)
    return meta.step


def _moments(model: DiT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of AdamW by the names of the parameters."""
    return {
        f"{name}.{key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in MOMENTS
    }


def _count_updates(optimizer: torch.optim.Optimizer | None) -> int:
    states = optimizer.state.values() if optimizer is not None else ()
    return next((int(state["step"]) for state in states), 0)


def _restore_moments(
    model: DiT,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    updates: int,
    folder: Path,
) -> None:
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = {key: tensors.pop(f"{name}.{key}", None) for key in MOMENTS}
        moments = {
            key: t.to(p.device, p.dtype)
            for key, t in state.items()
            if t is not None and t.shape == p.shape
        }
        if len(moments) < len(MOMENTS):
            raise UsageError(f"{folder}: the moments of {name} are missing or of another shape")
        step = torch.tensor(float(updates), device=p.device)
        optimizer.state[p] = {**moments, "step": step}
    if tensors:
        raise UsageError(f"{folder}: moments of unknown parameters: {', '.join(list(tensors)[:3])}")


def read_commit() -> str | None:
    """Return the git revision of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def _write_shards(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write files of at most SHARD_BYTES, or of one tensor; return their paths."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, t in tensors.items():
        if t.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = t
        room -= t.nbytes
    paths = []
    for i, shard in enumerate(shards):
        paths.append(folder / f"{part}-{i:05d}.safetensors")
        write_tensors(shard, paths[-1])
        _sync(paths[-1])
    return paths


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; OSError if it cannot be written."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _read_shards(folder: Path, part: str) -> dict[str, Tensor]:
    paths = sorted(folder.glob(f"{part}-*.safetensors"))
    if not paths:
        raise UsageError(f"{folder} has no {part} weights")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: not a complete safetensors file: {error}") from error
    return tensors


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, newest: Path, keep: int, good: Path | None) -> None:
    """Delete old checkpoints, except the newest `keep` and the last good one."""
    complete = sorted(p for p in folder.glob("step-*") if p.name <= newest.name)
    for old in complete[:-keep]:
        if old != good:
            shutil.rmtree(old)


def _alternatives(checkpoint: Path) -> str:
    others = sorted(p.name for p in checkpoint.parent.glob("step-*") if p != checkpoint)
    return f"; resume from another: {', '.join(others)}" if others else ""
