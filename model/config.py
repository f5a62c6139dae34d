"""One flat configuration of a model and its run: fields, presets, overrides, checks.

A field whose `paper` is None is not stated in the paper: its default is a choice of this project.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

RESIDUALS = ("post", "layerscale", "rezero", "mvsplit", "hard_center", "attention_only")
WRITER_INITS = ("zero", "default", "normal")
PRECISIONS = ("fp32", "bf16-autocast", "bf16")
DATASETS = ("shapes", "latents")
TIMES = ("uniform", "logit_normal")
GUARDS = ("off", "warn", "stop", "skip")  # model.collapse says what each does
DEVICES = ("auto", "cpu", "cuda")


class UsageError(ValueError):
    """What a user asked for cannot be done; the message says what was expected and the remedy."""


def _field(default, help, paper=None):
    return dataclasses.field(default=default, metadata={"help": help, "paper": paper})


@dataclass(frozen=True)
class Config:
    """All that decides a run. `help` and `paper` of a field are in its metadata."""

    # The model
    depth: int = _field(12, "blocks, L", "400 and 1000")
    dim: int = _field(64, "width of the trunk, D", "1024")
    heads: int = _field(4, "attention heads, H; D/H a multiple of 16", "8")
    ffn: int = _field(192, "width of SwiGLU, F", "3072")
    channels: int = _field(3, "channels of an image or latent", "128")
    size: int = _field(16, "height and width of an image or latent", "16")
    patch: int = _field(2, "side of a patch; a token is a patch", "1")
    text_tokens: int = _field(4, "text tokens of a sample, padding included")
    text_dim: int = _field(64, "width of a text embedding", "1024")
    residual: str = _field("mvsplit", f"one of {', '.join(RESIDUALS)}", "post, layerscale, mvsplit")
    writer_init: str = _field(
        "zero", f"start of W_O and W_2, one of {', '.join(WRITER_INITS)}", "zero in the baseline"
    )
    init_alpha: float = _field(0.0, "MV-Split: start of the mean's gain, alpha", "0")
    init_beta: float = _field(1.0, "MV-Split: start of the centred gain, beta", "1; 0.03 at 1000")
    init_scale: float = _field(1e-2, "LayerScale: start of lambda", "1e-2 to 1e-5")
    carry_mean: bool = _field(False, "merges hand the token mean of their result to the next")

    # The data
    data: str = _field("shapes", f"one of {', '.join(DATASETS)}", "ImageNet latents")
    data_path: str = _field("", "folder of the latents")
    caption_drop: float = _field(0.1, "share of captions replaced by the empty one")

    # The flow
    time: str = _field("uniform", f"distribution of t before the shift, one of {', '.join(TIMES)}")
    time_shift: float = _field(1.0, "a in t' = a t / (1 + (a - 1) t)", "4")

    # The optimizer
    steps: int = _field(3000, "optimizer steps", "50000")
    batch: int = _field(16, "samples of an optimizer step", "1024")
    micro_batch: int = _field(0, "samples of a forward pass; 0: the batch")
    lr: float = _field(3e-3, "AdamW's learning rate after the warm-up", "1.5625e-4")
    warmup: int = _field(100, "steps of linear warm-up, then constant", "1000")
    beta1: float = _field(0.9, "AdamW's first-moment decay")
    beta2: float = _field(0.95, "AdamW's second-moment decay")
    adam_eps: float = _field(1e-8, "AdamW's eps")
    weight_decay: float = _field(0.1, "on matrices alone", "0.1")
    clip: float = _field(1.0, "largest gradient norm; 0: no clipping", "1.0")
    ema: float = _field(0.0, "decay of the averaged weights; 0: none")

    # The run
    seed: int = _field(0, "of weights, noise, times, caption drop and data order")
    device: str = _field("auto", "auto (cuda where there is one), cpu, cuda, cuda:N", "cuda")
    threads: int = _field(1, "CPU threads of PyTorch; 0: its own choice")
    backend: str = _field("", "of the operators; empty: the device's default")
    precision: str = _field("fp32", f"one of {', '.join(PRECISIONS)}")
    checkpointing: str = _field(
        "none", "blocks recomputed in backward: none, full, k/n (3/4) or selective", "3/4"
    )
    compile: bool = _field(False, "torch.compile every block")
    log_every: int = _field(10, "steps between lines of metrics.jsonl")
    save_every: int = _field(500, "steps between checkpoints; 0: at the end alone")
    keep: int = _field(2, "checkpoints kept")
    sample_every: int = _field(0, "steps between sample grids; 0: none")
    probes: bool = _field(True, "measure what model.diagnostics defines, at four depths")
    tensorboard: bool = _field(False, "write TensorBoard events too")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f, getattr(self, f.name)))
        _check(self)

    @property
    def head_dim(self):
        return self.dim // self.heads

    @property
    def segments(self):
        """Token counts of the image and of the text."""
        return (self.size // self.patch) ** 2, self.text_tokens

    @property
    def hash(self):
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}

# What a run may change when it goes on from a checkpoint: where and how, not what is computed.
FREE_ON_RESUME = frozenset(
    "steps device threads backend checkpointing compile carry_mean micro_batch log_every "
    "save_every keep sample_every tensorboard data_path probes".split()
)
# What a new run may change besides when it begins from another one's checkpoint.
FREE_ON_BRANCH = FREE_ON_RESUME | frozenset(
    "lr warmup beta1 beta2 adam_eps weight_decay clip".split()
)

_COLLAPSE = dict(
    dim=32, heads=2, ffn=96, text_dim=32, writer_init="default", init_beta=0.03, batch=8,
    warmup=20, log_every=1, save_every=0,
)  # fmt: skip
_DIT = dict(
    depth=400, dim=1024, heads=8, ffn=3072, channels=128, patch=1, text_tokens=64, text_dim=1024,
    data="latents", data_path="latents", time_shift=4.0, steps=50_000, batch=1024, micro_batch=16,
    lr=1.5625e-4, warmup=1000, precision="bf16-autocast", checkpointing="3/4", carry_mean=True,
    device="cuda", threads=0, save_every=1000,
)  # fmt: skip

PRESETS = {
    "tiny": {},
    "collapse100": dict(_COLLAPSE, depth=100, lr=1e-2, steps=100),
    "collapse400": dict(_COLLAPSE, depth=400, lr=3e-3, steps=60),
    "gpu-small": dict(
        depth=100, dim=256, heads=4, ffn=768, size=32, text_dim=256, writer_init="default",
        init_beta=0.03, batch=128, lr=5e-4, warmup=500, steps=10_000, precision="bf16-autocast",
        carry_mean=True, threads=0, sample_every=1000,
    ),
    "dit400-post": dict(_DIT, residual="post"),
    "dit400-layerscale": dict(_DIT, residual="layerscale", writer_init="default"),
    "dit400-mvsplit": dict(_DIT),
    "dit1000-mvsplit": dict(
        _DIT, depth=1000, writer_init="default", init_beta=0.03, checkpointing="full"
    ),
}  # fmt: skip

# The residuals that a demonstration sets side by side, each with the start that suits it.
CONTENDERS = {
    "post": dict(residual="post", writer_init="zero"),
    "layerscale": dict(residual="layerscale", writer_init="default", init_scale=1e-2),
    "mvsplit": dict(residual="mvsplit", writer_init="default", init_beta=0.03),
}


def preset(name, **overrides):
    """The configuration of a preset, with fields overridden."""
    if name not in PRESETS:
        raise UsageError(_unknown("preset", name, PRESETS))
    return from_dict({**PRESETS[name], **overrides})


def from_dict(values):
    for name in values:
        if name not in FIELDS:
            raise UsageError(_unknown("field", name, FIELDS))
    return Config(**values)


def parse_overrides(assignments):
    """{field: value} from "field=value" strings, as --set takes them."""
    values = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--set: must be field=value, got {text!r}")
        if name not in FIELDS:
            raise UsageError("--set: " + _unknown("field", name, FIELDS))
        values[name] = value
    return values


def read(path):
    """The configuration in a JSON file, as a run's config.json holds it."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold one object of fields, got {type(values).__name__}")
    return from_dict(values)


def differences(one, other, but=()):
    """{field: (one's value, other's)} where two configurations differ."""
    pairs = {n: (getattr(one, n), getattr(other, n)) for n in FIELDS if n not in but}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def recomputed_blocks(checkpointing, depth):
    """Which blocks are recomputed in backward: of k/n, block i where i mod n < k."""
    if checkpointing in ("none", "full", "selective"):
        return [checkpointing != "none"] * depth
    k, n = map(int, checkpointing.split("/"))
    return [i % n < k for i in range(depth)]


def _unknown(what, name, known):
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no {what} {name!r}{hint} There are: {', '.join(known)}"


def _typed(field, value):
    """A field's value in its type; strings are read as --set gives them."""
    name, kind = field.name, field.type
    wrong = UsageError(f"{name} must be {_ARTICLES[kind]}, got {value!r}")
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false", "1", "0"):
            raise wrong
        return value.lower() in ("true", "1")
    if kind is int and isinstance(value, float):
        raise wrong
    if isinstance(value, bool) != (kind is bool) or (kind is str and not isinstance(value, str)):
        raise wrong
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise wrong from None


_ARTICLES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

_CHOICES = {
    "residual": RESIDUALS,
    "writer_init": WRITER_INITS,
    "precision": PRECISIONS,
    "data": DATASETS,
    "time": TIMES,
}
_AT_LEAST = {
    1: "depth dim heads ffn channels size patch text_tokens text_dim steps batch log_every keep",
    0: "threads micro_batch warmup save_every sample_every seed weight_decay clip adam_eps lr",
}


def _check(c):
    for name, choices in _CHOICES.items():
        if getattr(c, name) not in choices:
            raise UsageError(_unknown(name, getattr(c, name), choices))
    for least, names in _AT_LEAST.items():
        for name in names.split():
            if not getattr(c, name) >= least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(c, name)}")
    if c.seed >= 1 << 63:
        raise UsageError(f"seed must be below 2^63, got {c.seed}")
    for name in ("beta1", "beta2", "ema", "caption_drop"):
        if not 0 <= getattr(c, name) < 1:
            raise UsageError(f"{name} must be at least 0 and below 1, got {getattr(c, name)}")
    if not c.time_shift > 0:
        raise UsageError(f"time_shift must be above 0, got {c.time_shift}")
    if c.dim % c.heads or c.head_dim % 16:
        raise UsageError(f"dim / heads must be a multiple of 16, got {c.dim} / {c.heads}")
    if c.size % c.patch:
        raise UsageError(f"size must be a multiple of patch, got {c.size} and {c.patch}")
    if c.device.split(":")[0] not in DEVICES:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {c.device!r}")
    _check_checkpointing(c.checkpointing)


def _check_checkpointing(text):
    if text in ("none", "full", "selective"):
        return
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 0 < int(match[1]) <= int(match[2]):
        raise UsageError(
            "checkpointing must be none, full, selective or k/n with k <= n, e.g. 3/4, "
            f"got {text!r}"
        )
