"""Precomputed latents with text embeddings: safetensors shards and a manifest.

    dataset.json         what is here: shapes, counts, normalisation, where it came from
    shard-00000.safetensors    latents (N, C, size, size), caption (N,) int64
    text-00000.safetensors     text (M, tokens, width), captions without repetition, in order
    captions.jsonl             {"caption": "..."} a line, in the order of text

Captions are padded by whoever wrote them, to one length: what is stored is what is attended, so a
sample never depends on its batch mates. `write` makes such a folder.
"""

import bisect
import functools
import hashlib
import itertools
import json
from pathlib import Path

import torch

from model.config import UsageError
from model.rng import stream

MANIFEST, CAPTIONS = "dataset.json", "captions.jsonl"
FORMAT = "mvsplit-latents-1"
RMS = (0.8, 1.2)  # of normalised latents: outside, the statistics are of another encoder


class Latents:
    """Normalised latents (C, size, size) and their captions' embeddings, by index."""

    def __init__(self, config):
        self.folder = Path(config.data_path)
        text = _read(self.folder / MANIFEST).decode(errors="replace")
        self.manifest = _parse(text, self.folder)
        self._match(config)
        self.fingerprint = f"latents, {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._seed = config.seed
        self._latents = _Shards(self, "shards", "latents", ("channels", "size", "size"))
        self._text = _Shards(self, "text_shards", "text", ("text_tokens", "text_dim"))
        self._check_captions()
        self.empty = self._text.get(self.manifest["empty_caption"])["text"].float()
        self._check_scale()

    def __len__(self):
        return len(self._latents)

    def index(self, n):
        """Every epoch is a permutation of its own."""
        epoch, place = divmod(n, len(self))
        return int(self._order(epoch)[place])

    def get(self, index):
        row = self._latents.get(index)
        x = (row["latents"].float() - self.manifest["mean"]) / self.manifest["std"]
        return x, self._text.get(int(row["caption"]))["text"].float()

    def captions(self, n):
        known = self._captions()
        return [known[i % len(known)] for i in range(n)]

    def embed(self, captions):
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

    def to_rgb(self, x):
        """The first three channels, each stretched to [0, 1]: a look at latents, not an image."""
        x = x.detach().float().cpu()[:, :3]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3 - x.shape[1]))
        low, high = (f(x, (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        return (x - low) / (high - low).clamp(
            min=1e-6
        ), "first three channels of latents, stretched"

    def _captions(self):
        lines = _read(self.folder / CAPTIONS).decode(errors="replace").splitlines()
        try:
            return [json.loads(line)["caption"] for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f'{self.folder / CAPTIONS}: a line is not {{"caption": ...}}'
            ) from error

    @functools.lru_cache(maxsize=2)  # noqa: B019  # datasets live as long as the process
    def _order(self, epoch):
        return stream(self._seed, "order", epoch).permutation(len(self))

    def _match(self, config):
        for name in ("channels", "size", "text_tokens", "text_dim"):
            if self.manifest[name] != getattr(config, name):
                raise UsageError(
                    f"{self.folder / MANIFEST}: {name} is {self.manifest[name]}, but the model is "
                    f"configured for {getattr(config, name)}; pass "
                    f"--set {name}={self.manifest[name]}"
                )

    def _check_captions(self):
        """Every latent's caption, and the empty one, is a row of text."""
        empty = torch.tensor([self.manifest["empty_caption"]])
        columns = {MANIFEST: empty, **self._latents.columns("caption")}
        for name, captions in columns.items():
            if captions.min() < 0 or captions.max() >= len(self._text):
                raise UsageError(
                    f"{self.folder / name}: a caption must be 0 to {len(self._text) - 1}, rows of "
                    f"text, got {captions.min()} to {captions.max()}"
                )

    def _check_scale(self):
        n = min(len(self), 64)
        first = torch.stack([self.get(i)[0] for i in range(n)])
        if not torch.isfinite(first).all():
            raise UsageError(
                f"{self.folder}: the first {n} latents hold a value that is not finite"
            )
        rms = first.square().mean().sqrt().item()
        if not RMS[0] <= rms <= RMS[1]:
            raise UsageError(
                f"{self.folder}: the first {n} latents have a root mean square of {rms:.3g} after "
                f"normalisation, expected {RMS[0]} to {RMS[1]}; mend mean and std in {MANIFEST}"
            )


class _Shards:
    """Rows of one or more tensors over safetensors files, checked against the manifest."""

    def __init__(self, dataset, kind, tensor, shape):
        self._files = [dataset.folder / entry["file"] for entry in dataset.manifest[kind]]
        counts = [entry["count"] for entry in dataset.manifest[kind]]
        self._ends = list(itertools.accumulate(counts))
        row = [dataset.manifest[name] for name in shape]
        for path, count in zip(self._files, counts, strict=True):
            names = _open(path).keys() if path.is_file() else ()
            found = _open(path).get_slice(tensor).get_shape() if tensor in names else None
            if found != [count, *row]:
                got = found or (f"no {tensor}" if names else "no such file")
                raise UsageError(f"{path}: the manifest says {tensor} {[count, *row]}, got {got}")

    def columns(self, tensor):
        """{file name: a small tensor of all its rows}."""
        for path in self._files:
            if tensor not in _open(path).keys():
                raise UsageError(f"{path}: has no {tensor}")
        return {path.name: _open(path).get_tensor(tensor) for path in self._files}

    def __len__(self):
        return self._ends[-1]

    def get(self, index):
        """{tensor: row}."""
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        file = _open(self._files[shard])
        return {name: file.get_slice(name)[index - start] for name in file.keys()}


@functools.cache
def _open(path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a whole safetensors file, {error}") from error


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no latents at {path.parent}: cannot read {path.name}, {error.strerror}; "
            "pass --set data_path=FOLDER"
        ) from error


_NAMES = {
    **dict.fromkeys(("channels", "size", "text_tokens", "text_dim"), int),
    "empty_caption": int,
    **dict.fromkeys(("mean", "std"), (int, float)),
    **dict.fromkeys(("shards", "text_shards"), list),
}


def _parse(text, folder):
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f'{path}: "format" must be {FORMAT!r}; model.data.latents.write makes it')
    for name, kind in _NAMES.items():
        if not isinstance(manifest.get(name), kind):
            raise UsageError(f"{path}: {name} is missing or of the wrong type")
    for name in ("shards", "text_shards"):
        if not manifest[name] or not all(map(_is_entry, manifest[name])):
            raise UsageError(
                f'{path}: {name} must be a list of {{"file": name, "count": 1 or more}}'
            )
    return manifest


def _is_entry(entry):
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("count"), int)
        and entry["count"] > 0
    )


def write(folder, batches, captions, text, empty_caption, source="", mean=0.0, std=1.0):
    """Write a dataset; its manifest comes last, so a folder with one is whole.

    batches        iterable of (latents (N, C, size, size), caption (N,) rows of text): a shard each
    captions       the captions in words;  text (M, tokens, width), their embeddings
    empty_caption  which of them is the empty one
    source         in words: encoder, images, crop
    mean, std      of all latents; what is read is (latents - mean) / std
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder} holds a dataset already; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, (latents, caption) in enumerate(batches):
        if len(caption) != len(latents) or caption.min() < 0 or caption.max() >= len(text):
            raise UsageError(
                f"latents.write: batch {i} needs {len(latents)} captions of 0 to {len(text) - 1}"
            )
        shards.append({"file": f"shard-{i:05d}.safetensors", "count": len(latents)})
        tensors = {"latents": latents.contiguous(), "caption": caption.long().contiguous()}
        save_file(tensors, folder / shards[-1]["file"])
    if not shards:
        raise UsageError("latents.write: there must be at least one batch")
    save_file({"text": text.contiguous()}, folder / "text-00000.safetensors")
    lines = (json.dumps({"caption": caption}) + "\n" for caption in captions)
    (folder / CAPTIONS).write_text("".join(lines))
    manifest = {
        "format": FORMAT, "source": source, "mean": mean, "std": std,
        "channels": latents.shape[1], "size": latents.shape[2],
        "text_tokens": text.shape[1], "text_dim": text.shape[2], "empty_caption": empty_caption,
        "shards": shards,
        "text_shards": [{"file": "text-00000.safetensors", "count": len(text)}],
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
