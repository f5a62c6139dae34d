"""Weights in and out: the published checkpoint's layout, and plain safetensors.

Both have the published names of parameters. `official` is a torch.save of the state dict, model.pt;
`safetensors` is one file with the configuration in its metadata.
"""

import dataclasses
import json
import pickle
from pathlib import Path

import torch

from model import config as configuration
from model.config import UsageError
from model.nn.dit import build
from model.train import checkpoint

FORMATS = ("official", "safetensors")


def export(run, path, to, part="model"):
    """Write the weights of a run or checkpoint to a file; returns how many tensors."""
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    if (path.suffix == ".safetensors") != (to == "safetensors"):
        raise UsageError(f"--out: name it .safetensors for --to safetensors alone, got {path}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--out: no folder {path.parent}; make it first")
    model, meta, folder = checkpoint.open_run(run, part=part)
    if to == "official" and meta["config"].residual != "mvsplit":
        raise UsageError(
            f"{folder} has residual {meta['config'].residual}; the official layout is of mvsplit "
            "alone: use --to safetensors"
        )
    state = dict(model.state_dict())
    partial = path.with_name(f".{path.name}")
    if to == "official":
        torch.save(state, partial)
    else:
        config = json.dumps(dataclasses.asdict(meta["config"]))
        metadata = {"config": config, "step": str(meta["step"])}
        checkpoint.write_tensors(state, partial, metadata)
    partial.rename(path)
    return len(state)


def import_weights(path, run, config, overrides):
    """Make a run of a weights file, strictly.

    config     None: the one in a safetensors file;  overrides  {field: value} on top of it
    """
    state, inside = _read(Path(path))
    if config is None and inside is None:
        raise UsageError(f"{path} does not say its configuration; name a preset")
    base = json.loads(inside) if config is None else dataclasses.asdict(config)
    config = configuration.from_dict({**base, **overrides})
    if (Path(run) / "config.json").exists():
        raise UsageError(f"{run} holds a run already; choose another --out")
    model = build(config, "meta")
    model.to_empty(device="cpu")
    checkpoint.load_strictly(model, state, path)
    Path(run).mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    folder = checkpoint.save(run, 0, config, None, model)  # no data yet
    (Path(run) / "config.json").write_text(text)
    return folder


def _read(path):
    """The tensors of a file and the configuration in it, or None."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
                return state, (file.metadata() or {}).get("config")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a whole file of weights: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UsageError(f"{path}: must hold a state dict of tensors alone")
    return state, None
