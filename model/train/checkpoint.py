"""Checkpoints that a kill at any moment leaves whole.

    RUN/checkpoints/step-00000010/   meta.json, model-*.safetensors, adamw-*, average-*, guard.json
    RUN/checkpoints/latest           the name of the newest whole one

Everything is written to a folder with another name, synchronised and renamed; `latest` follows, and
only then do old ones go. meta.json holds every file's size, the configuration and the data.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from model import config as configuration
from model.config import FREE_ON_BRANCH, FREE_ON_RESUME, UsageError
from model.nn.dit import build, without_weights_of_ones

FORMAT = "mvsplit-checkpoint-1"
SHARD_BYTES = 4 << 30  # of a file; what is copied from the device at a time
LATEST = "latest"
GUARD = "guard.json"


def save(run, step, config, fingerprint, model, optimizer=None, average=None, guard=None):
    """Write RUN/checkpoints/step-N of the state after `step` updates; returns the folder."""
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*"):  # of a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    final, partial = folder / name_of(step), folder / f".{name_of(step)}"
    partial.mkdir()
    parts = {"model": model.state_dict()}
    if optimizer is not None:
        parts["adamw"] = moments(model, optimizer)
    if average is not None and average.tensors:
        parts["average"] = average.tensors
    files = {}
    for part, tensors in parts.items():
        for path in _write(partial, part, tensors):
            files[path.name] = path.stat().st_size
    watched = guard.saving(step, name_of(step)) if guard else None
    if watched:
        _write_text(partial / GUARD, json.dumps(watched))
        files[GUARD] = (partial / GUARD).stat().st_size
    meta = {
        "format": FORMAT, "step": step, "config": dataclasses.asdict(config),
        "config_hash": config.hash, "data": fingerprint, "commit": commit(),
        "torch": torch.__version__, "updates": _updates(optimizer), "files": files,
    }  # fmt: skip
    _write_text(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
    _sync(partial)
    if final.exists():  # never the one that `latest` names: an older run's, or a killed one's
        shutil.rmtree(final)
    os.rename(partial, final)
    point_to(final)
    _prune(folder, final, config.keep, guard.good if guard else None)
    return final


def point_to(checkpoint):
    """Make a checkpoint the one that its run stands at."""
    folder = checkpoint.parent
    _write_text(folder / f".{LATEST}", checkpoint.name + "\n")
    os.replace(folder / f".{LATEST}", folder / LATEST)
    _sync(folder)


def find(path):
    """The checkpoint folder that a path names: itself, or the newest one of a run."""
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    pointer = path / "checkpoints" / LATEST
    if not pointer.is_file():
        raise UsageError(f"{path} is neither a run with a checkpoint nor a checkpoint")
    return pointer.parent / _pointed_to(pointer)


def newest_step(run):
    """The step of a run's newest checkpoint, or None."""
    pointer = Path(run) / "checkpoints" / LATEST
    return step_of(Path(_pointed_to(pointer))) if pointer.is_file() else None


def _pointed_to(pointer):
    name = pointer.read_text().strip()
    if not re.fullmatch(r"step-\d+", name):
        raise UsageError(
            f"{pointer} must name a checkpoint beside it, got {name!r}{_another(pointer)}"
        )
    return name


def step_of(checkpoint):
    """The step of a checkpoint folder, by its name."""
    return int(checkpoint.name.split("-")[1])


def read_guard(checkpoint):
    """What the guard left in a checkpoint, or None."""
    path = checkpoint / GUARD
    return json.loads(path.read_text()) if path.is_file() else None


def read_meta(folder):
    """meta.json of a checkpoint whose files are all there, whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = meta["files"]
        meta["config"] = configuration.from_dict(meta["config"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{folder}: no checkpoint, its meta.json cannot be read: {error}"
        ) from error
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise UsageError(
                f"{folder / name}: expected {size} bytes, got {found or 'no such file'}; "
                f"the checkpoint is damaged{_another(folder)}"
            )
    return meta


def open_run(path, device="cpu", part="model", **overrides):
    """The model of a run or checkpoint, its configuration with overrides, and its folder."""
    folder = find(path)
    meta = read_meta(folder)
    config = dataclasses.replace(meta["config"], **overrides)
    model = build(config, device)
    load_model(folder, model, part)
    return model, meta, folder


def load_model(folder, model, part="model"):
    """Strictly: every parameter and buffer, nothing else, in its shape. part: model or average."""
    tensors = _read(folder, part)
    if part == "average":
        tensors = {**model.state_dict(), **tensors}
    load_strictly(model, tensors, folder)


def load_strictly(model, tensors, source):
    """model.load_state_dict, whose complaint is one sentence."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    try:
        tensors = without_weights_of_ones(tensors)
    except RuntimeError as error:
        raise UsageError(f"{source}: {error}") from error
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        given = {name: tuple(t.shape) for name, t in tensors.items()}
        wrong = [f"{n} is {given[n]}, not {own[n]}" for n in own if given.get(n, own[n]) != own[n]]
        missing = [f"{n} is missing" for n in own if n not in given]
        extra = [f"{n} is not of this model" for n in given if n not in own]
        found = wrong + missing + extra
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"{source} does not fit the model ({model.config.residual}, depth "
            f"{model.config.depth}, width {model.config.dim}): {'; '.join(found[:3])}{more}"
        ) from error


def restore(folder, config, fingerprint, model, optimizer, average, free=FREE_ON_RESUME):
    """Put a run back to a checkpoint; returns its step. Configurations may differ in `free`."""
    meta = read_meta(folder)
    changed = configuration.differences(meta["config"], config, but=free)
    if changed:
        name, (then, now) = next(iter(changed.items()))
        raise UsageError(
            f"{folder} was trained with {name}={then}, not {now} ({len(changed)} fields differ); "
            f"resume with its configuration, or start a new run with another --out, which may "
            f"change {', '.join(sorted(FREE_ON_BRANCH - FREE_ON_RESUME))}"
        )
    if meta["data"] not in (fingerprint, None):  # an imported model has seen none
        raise UsageError(f"{folder} was trained on {meta['data']}; the data now are {fingerprint}")
    load_model(folder, model)
    if meta["updates"]:  # an imported model has none
        _restore_moments(model, optimizer, _read(folder, "adamw"), meta["updates"], folder)
    average.restart()  # an imported model has none
    if average.tensors and meta["updates"]:
        for name, tensor in _read(folder, "average").items():
            average.tensors[name].copy_(tensor)
    return meta["step"]


def moments(model, optimizer):
    """AdamW's state by the names of parameters."""
    return {
        f"{name}.{key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key in ("exp_avg", "exp_avg_sq")
    }


def _updates(optimizer):
    """How many updates AdamW has taken: fewer than steps where some were skipped."""
    states = optimizer.state.values() if optimizer is not None else ()
    return next((int(state["step"]) for state in states), 0)


def _restore_moments(model, optimizer, tensors, updates, folder):
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = {key: tensors.pop(f"{name}.{key}", None) for key in ("exp_avg", "exp_avg_sq")}
        if any(t is None or t.shape != p.shape for t in state.values()):
            raise UsageError(f"{folder}: the moments of {name} are missing or of another shape")
        optimizer.state[p] = {key: t.to(p.device, p.dtype) for key, t in state.items()}
        optimizer.state[p]["step"] = torch.tensor(float(updates), device=p.device)
    if tensors:
        raise UsageError(f"{folder}: moments of unknown parameters: {', '.join(list(tensors)[:3])}")


def commit():
    """The git revision of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def name_of(step):
    return f"step-{step:08d}"


def _write(folder, part, tensors):
    """Safetensors files of at most SHARD_BYTES (or one tensor) each; returns their paths."""
    shards, room = [{}], SHARD_BYTES
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


def write_tensors(tensors, path, metadata=None):
    """A safetensors file; OSError says why it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _read(folder, part):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = sorted(folder.glob(f"{part}-*.safetensors"))
    if not paths:
        raise UsageError(f"{folder} has no {part} weights")
    tensors = {}
    for path in paths:
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors


def _write_text(path, text):
    path.write_text(text)
    _sync(path)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder, newest, keep, good):
    whole = sorted(p for p in folder.glob("step-*") if p.name <= newest.name)
    for old in whole[:-keep]:
        if old != good:
            shutil.rmtree(old)


def _another(folder):
    others = sorted(p.name for p in folder.parent.glob("step-*") if p != folder)
    return f"; resume from another: {', '.join(others)}" if others else ""
