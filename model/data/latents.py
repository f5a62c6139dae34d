"""Precomputed latents with text embeddings, in safetensors files with a manifest.

    dataset.json               shapes, counts, normalisation, source
    shard-00000.safetensors    latents (N, C, size, size), caption (N,) int64
    text-00000.safetensors     text (M, tokens, width), one row per distinct caption
    captions.jsonl             {"caption": "..."} per line, in the order of text

Captions are stored padded to one length and attended as stored, so a sample never depends on the
other samples of its batch. `write` creates such a folder.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.config import Config, UsageError
from model.rng import stream

if TYPE_CHECKING:
    from safetensors import safe_open

MANIFEST, CAPTIONS = "dataset.json", "captions.jsonl"
LATENTS_FORMAT = "mvsplit-latents-1"
RMS_RANGE = (0.8, 1.2)  # of normalised latents; outside, mean and std are of another encoder
CHECKED_LATENTS = 64  # whose values are checked when a dataset is opened


class Latents:
    """Normalised latents (C, size, size) and the embeddings of their captions, by index."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.data_path)
        text = _read(self.folder / MANIFEST).decode(errors="replace")
        self.manifest = _parse(text, self.folder)
        self._check_shapes(config)
        self.fingerprint = f"latents, {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._seed = config.seed
        self._latents = _Shards(self, "shards", "latents", ("channels", "size", "size"))
        self._text = _Shards(self, "text_shards", "text", ("text_tokens", "text_dim"))
        self._check_captions()
        self.empty = self._text.get(self.manifest["empty_caption"])["text"].float()
        self._check_scale()

    def __len__(self) -> int:
        return len(self._latents)

    def index(self, n: int) -> int:
        """Return the index of the n-th sample of training; each epoch is another permutation."""
        epoch, place = divmod(n, len(self))
        return int(self._order(epoch)[place])

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._latents.get(index)
        x = (row["latents"].float() - self.manifest["mean"]) / self.manifest["std"]
        return x, self._text.get(int(row["caption"]))["text"].float()

    def captions(self, n: int) -> list[str]:
        known = self._captions()
        return [known[i % len(known)] for i in range(n)]

    def embed(self, captions: Sequence[str]) -> Tensor:
        places = {caption: i for i, caption in enumerate(self._captions())}
        for caption in captions:
            if caption not in places:
                raise UsageError(
                    f"{self.folder} has no embedding of caption {caption!r}; its {len(places)} "
                    f"captions are in {CAPTIONS}, e.g. {next(iter(places))!r}"
                )
        return torch.stack(
            [self._text.get(places[caption])["text"].float() for caption in captions]
        )

    def to_rgb(self, x: Tensor) -> tuple[Tensor, str]:
        """Return the first three channels, each stretched to [0, 1], without decoding."""
        x = x.detach().float().cpu()[:, :3]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3 - x.shape[1]))
        low, high = (f(x, (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        rgb = (x - low) / (high - low).clamp(min=1e-6)
        return rgb, "first three channels of latents, stretched"

    def _captions(self) -> list[str]:
        lines = _read(self.folder / CAPTIONS).decode(errors="replace").splitlines()
        try:
            return [json.loads(line)["caption"] for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f'{self.folder / CAPTIONS}: each line must be {{"caption": "..."}}'
            ) from error

    @functools.lru_cache(maxsize=2)  # noqa: B019  # datasets live as long as the process
    def _order(self, epoch: int) -> np.ndarray:
        return stream(self._seed, "order", epoch).permutation(len(self))

    def _check_shapes(self, config: Config) -> None:
        for name in ("channels", "size", "text_tokens", "text_dim"):
            if self.manifest[name] != getattr(config, name):
                raise UsageError(
                    f"{self.folder / MANIFEST}: {name} is {self.manifest[name]}, but the model is "
                    f"configured for {getattr(config, name)}; pass "
                    f"--set {name}={self.manifest[name]}"
                )

    def _check_captions(self) -> None:
        """Check that the caption of each latent, and the empty caption, are rows of text."""
        empty = torch.tensor([self.manifest["empty_caption"]])
        columns = {MANIFEST: empty, **self._latents.columns("caption")}
        for name, captions in columns.items():
            if captions.min() < 0 or captions.max() >= len(self._text):
                raise UsageError(
                    f"{self.folder / name}: captions must be rows of text, 0 to "
                    f"{len(self._text) - 1}, got {captions.min()} to {captions.max()}"
                )

    def _check_scale(self) -> None:
        n = min(len(self), CHECKED_LATENTS)
        first = torch.stack([self.get(i)[0] for i in range(n)])
        if not torch.isfinite(first).all():
            raise UsageError(
                f"{self.folder}: the first {n} latents contain NaN or infinity; write them again"
            )
        rms = first.square().mean().sqrt().item()
        low, high = RMS_RANGE
        if not low <= rms <= high:
            raise UsageError(
                f"{self.folder}: expected a root mean square of {low} to {high} after "
                f"normalisation, the first {n} latents have {rms:.3g}; correct mean and std in "
                f"{MANIFEST}"
            )


class _Shards:
    """Rows of one or more tensors over safetensors files, checked against the manifest.

    kind     the manifest's list of files;  shape   the manifest's names of the sizes of a row
    """

    def __init__(self, dataset: Latents, kind: str, tensor: str, shape: Sequence[str]) -> None:
        self._files = [dataset.folder / entry["file"] for entry in dataset.manifest[kind]]
        counts = [entry["count"] for entry in dataset.manifest[kind]]
        self._ends = list(itertools.accumulate(counts))
        row = [dataset.manifest[name] for name in shape]
        for path, count in zip(self._files, counts, strict=True):
            names = _open(path).keys() if path.is_file() else ()
            actual = _open(path).get_slice(tensor).get_shape() if tensor in names else None
            if actual != [count, *row]:
                got = actual or (f"no {tensor}" if names else "no such file")
                raise UsageError(
                    f"{path}: expected {tensor} {[count, *row]}, as in {MANIFEST}, got {got}"
                )

    def columns(self, tensor: str) -> dict[str, Tensor]:
        """Return {file name: all rows of a small tensor}."""
        for path in self._files:
            if tensor not in _open(path).keys():
                raise UsageError(f"{path}: expected a tensor {tensor}, the file has none")
        return {path.name: _open(path).get_tensor(tensor) for path in self._files}

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int) -> dict[str, Tensor]:
        """Return {name of a tensor: its row}."""
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        file = _open(self._files[shard])
        return {name: file.get_slice(name)[index - start] for name in file.keys()}


@functools.cache
def _open(path: Path) -> "safe_open":
    from safetensors import SafetensorError, safe_open  # optional: only latents need it

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a complete safetensors file: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no latents at {path.parent}: cannot read {path.name}, {error.strerror}; "
            "pass --set data_path=FOLDER"
        ) from error


_MANIFEST_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("channels", "size", "text_tokens", "text_dim", "empty_caption"), int),
    **dict.fromkeys(("mean", "std"), (int, float)),
    **dict.fromkeys(("shards", "text_shards"), list),
}


def _parse(text: str, folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != LATENTS_FORMAT:
        raise UsageError(
            f'{path}: "format" must be {LATENTS_FORMAT!r}; write the data with '
            "model.data.latents.write"
        )
    for name, kind in _MANIFEST_TYPES.items():
        if not isinstance(manifest.get(name), kind):
            raise UsageError(f"{path}: {name} is missing or of the wrong type")
    for name in ("shards", "text_shards"):
        if not manifest[name] or not all(map(_is_entry, manifest[name])):
            raise UsageError(
                f'{path}: {name} must be a list of {{"file": name, "count": 1 or more}}'
            )
    return manifest


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("count"), int)
        and entry["count"] > 0
    )


def write(
    folder: str | Path,
    batches: Iterable[tuple[Tensor, Tensor]],
    captions: Iterable[str],
    text: Tensor,
    empty_caption: int,
    source: str = "",
    mean: float = 0.0,
    std: float = 1.0,
) -> None:
    """Write a dataset. The manifest is written last, so a folder that has one is complete.

    batches        latents (N, C, size, size) and their captions, rows of text (N,); a shard each
    captions       captions in words
    text           embeddings (M, tokens, width) of the captions
    empty_caption  row of the empty caption
    source         description of encoder, images and crop
    mean, std      statistics of all latents; they are read as (latents - mean) / std
    """
    from safetensors.torch import save_file  # optional: only latents need it

    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} already contains a dataset; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    for i, (latents, caption) in enumerate(batches):
        if len(caption) != len(latents) or caption.min() < 0 or caption.max() >= len(text):
            raise UsageError(
                f"latents.write: batch {i} must have one caption from 0 to {len(text) - 1} for "
                f"each of its {len(latents)} latents"
            )
        shards.append({"file": f"shard-{i:05d}.safetensors", "count": len(latents)})
        tensors = {"latents": latents.contiguous(), "caption": caption.long().contiguous()}
        save_file(tensors, folder / shards[-1]["file"])
    if not shards:
        raise UsageError("latents.write: expected at least one batch, got none")
    save_file({"text": text.contiguous()}, folder / "text-00000.safetensors")
    lines = (json.dumps({"caption": caption}) + "\n" for caption in captions)
    (folder / CAPTIONS).write_text("".join(lines))
    manifest = {
        "format": LATENTS_FORMAT, "source": source, "mean": mean, "std": std,
        "channels": latents.shape[1], "size": latents.shape[2],
        "text_tokens": text.shape[1], "text_dim": text.shape[2], "empty_caption": empty_caption,
        "shards": shards,
        "text_shards": [{"file": "text-00000.safetensors", "count": len(text)}],
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
