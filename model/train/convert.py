"""Export and import of weights: the published checkpoint's layout, and plain safetensors.

Both use the published parameter names. `official` is model.pt, a torch.save of the state dict;
`safetensors` is one file with the configuration in its metadata.
"""

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import config as configuration
from model.config import Config, UsageError
from model.nn.dit import build
from model.train import checkpoint


def export(run: str | Path, path: str | Path, to: str, part: str = "model") -> int:
    """Write the weights of a run or checkpoint to a file; return the number of tensors.

    to     official or safetensors
    part   model, or average for the averaged weights
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    if (path.suffix == ".safetensors") != (to == "safetensors"):
        raise UsageError(
            f"--out: the suffix .safetensors is required with --to safetensors and reserved for "
            f"it, got {path}"
        )
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--out: the folder {path.parent} does not exist; create it first")
    model, meta, folder = checkpoint.open_run(run, part=part)
    if to == "official" and meta.config.residual != "mvsplit":
        raise UsageError(
            f"{folder} has residual={meta.config.residual}, but the official layout has only "
            "mvsplit; use --to safetensors"
        )
    state = dict(model.state_dict())
    partial = path.with_name(f".{path.name}")
    if to == "official":
        torch.save(state, partial)
    else:
        config = json.dumps(dataclasses.asdict(meta.config))
        metadata = {"config": config, "step": str(meta.step)}
        checkpoint.write_tensors(state, partial, metadata)
    partial.rename(path)
    return len(state)


def import_weights(
    path: str | Path, run: str | Path, config: Config | None, overrides: Mapping[str, Any]
) -> Path:
    """Create a run from a file of weights, which must fit exactly; return its checkpoint.

    config      None: the configuration in the safetensors file
    overrides   fields to change in it
    """
    tensors, config_json = _read(Path(path))
    if config is not None:
        base = dataclasses.asdict(config)
    elif config_json is not None:
        base = json.loads(config_json)
    else:
        raise UsageError(f"{path} contains no configuration; name a preset")
    config = configuration.from_dict({**base, **overrides})
    if (Path(run) / "config.json").exists():
        raise UsageError(f"{run} already contains a run; choose another --out")
    model = build(config, "meta")
    model.to_empty(device="cpu")
    checkpoint.load_strictly(model, tensors, path)
    Path(run).mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    folder = checkpoint.save(run, 0, checkpoint.TrainingState(config, None, model))
    (Path(run) / "config.json").write_text(text)
    return folder


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file, and its configuration as JSON or None."""
    if not path.is_file():
        raise UsageError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return tensors, (file.metadata() or {}).get("config")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a complete file of weights: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UsageError(f"{path}: must contain a state dict that has only tensors")
    return state, None
