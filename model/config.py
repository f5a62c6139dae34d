"""Configuration of a model and its training run: fields, presets, overrides, checks.

The paper (arXiv 2605.06169) does not state a field whose `paper` is None; its default is this
project's choice.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

RESIDUALS = ("post", "layerscale", "rezero", "mvsplit", "hard_center", "attention_only")
WRITER_INITS = ("zero", "default", "normal")
PRECISIONS = ("fp32", "bf16-autocast", "bf16")
DATASETS = ("shapes", "latents")
TIMES = ("uniform", "logit_normal")
GUARDS = ("off", "warn", "stop", "skip")  # see model.stability.response
DEVICES = ("auto", "cpu", "cuda")


class UsageError(ValueError):
    """A request that cannot be met; the message says what was expected and how to fix it."""


def _field(default: Value, help: str, paper: str | None = None) -> Value:
    return dataclasses.field(default=default, metadata={"help": help, "paper": paper})


@dataclass(frozen=True)
class Config:
    """Settings of a model and its training run.

    The metadata of a field has its description, `help`, and the paper's value, `paper`.
    """

    # The model
    depth: int = _field(12, "number of blocks, L", "400 and 1000")
    dim: int = _field(64, "width of the trunk, D", "1024")
    heads: int = _field(4, "number of attention heads, H; D / H must be a multiple of 16", "8")
    ffn: int = _field(192, "hidden width of SwiGLU, F", "3072")
    channels: int = _field(3, "channels of an image or latent", "128")
    size: int = _field(16, "height and width of an image or latent", "16")
    patch: int = _field(2, "side of a patch; each patch is one token", "1")
    text_tokens: int = _field(4, "text tokens of a sample, including padding")
    text_dim: int = _field(64, "width of a text embedding", "1024")
    residual: str = _field(
        "mvsplit", f"residual, one of {', '.join(RESIDUALS)}", "post, layerscale, mvsplit"
    )
    writer_init: str = _field(
        "zero",
        f"initial values of W_O and W_2, one of {', '.join(WRITER_INITS)}",
        "zero in the baseline",
    )
    init_alpha: float = _field(0.0, "MV-Split: initial gain of the mean, alpha", "0")
    init_beta: float = _field(
        1.0, "MV-Split: initial gain of the centred part, beta", "1; 0.03 at 1000"
    )
    init_scale: float = _field(1e-2, "LayerScale: initial value of lambda", "1e-2 to 1e-5")
    carry_mean: bool = _field(False, "each merge passes the token mean of its result to the next")

    # The data
    data: str = _field("shapes", f"training data, one of {', '.join(DATASETS)}", "ImageNet latents")
    data_path: str = _field("", "folder of the latents")
    caption_drop: float = _field(0.1, "share of captions replaced by the empty caption")

    # The flow
    time: str = _field("uniform", f"distribution of t before the shift, one of {', '.join(TIMES)}")
    time_shift: float = _field(1.0, "a in t' = a t / (1 + (a - 1) t)", "4")

    # The optimizer
    steps: int = _field(3000, "optimizer steps", "50000")
    batch: int = _field(16, "samples per optimizer step", "1024")
    micro_batch: int = _field(0, "samples per forward pass; 0: the whole batch")
    lr: float = _field(3e-3, "learning rate of AdamW after the warm-up", "1.5625e-4")
    warmup: int = _field(100, "steps of linear warm-up; the rate is constant afterwards", "1000")
    beta1: float = _field(0.9, "decay of the first moment of AdamW")
    beta2: float = _field(0.95, "decay of the second moment of AdamW")
    adam_eps: float = _field(1e-8, "eps of AdamW")
    weight_decay: float = _field(0.1, "weight decay of AdamW, applied to matrices only", "0.1")
    clip: float = _field(1.0, "maximum gradient norm; 0: no clipping", "1.0")
    ema: float = _field(0.0, "decay of the averaged weights; 0: no average")

    # The run
    seed: int = _field(0, "seed of weights, noise, times, caption drop and data order")
    device: str = _field("auto", "auto (cuda if available), cpu, cuda or cuda:N", "cuda")
    threads: int = _field(1, "CPU threads of PyTorch; 0: PyTorch's default")
    backend: str = _field("", "backend of the operators; empty: the default of the device")
    precision: str = _field("fp32", f"precision of training, one of {', '.join(PRECISIONS)}")
    checkpointing: str = _field(
        "none", "blocks recomputed in backward: none, full, k/n (e.g. 3/4) or selective", "3/4"
    )
    compile: bool = _field(False, "torch.compile every block")
    log_every: int = _field(10, "steps between lines of metrics.jsonl")
    save_every: int = _field(500, "steps between checkpoints; 0: only at the end")
    keep: int = _field(2, "number of checkpoints to keep")
    sample_every: int = _field(0, "steps between sample grids; 0: none")
    probes: bool = _field(True, "measure the metrics of model.stability.metrics at four depths")
    tensorboard: bool = _field(False, "also write TensorBoard events")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f, getattr(self, f.name)))
        _check(self)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def segments(self) -> tuple[int, int]:
        """The numbers of image tokens and of text tokens."""
        return (self.size // self.patch) ** 2, self.text_tokens

    @property
    def hash(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}

# Fields that may change when a run is resumed: where and how it runs, not what it computes.
FREE_ON_RESUME = frozenset(
    "steps device threads backend checkpointing compile carry_mean micro_batch log_every "
    "save_every keep sample_every tensorboard data_path probes".split()
)
# Fields that may also change when a new run starts from a checkpoint of another run.
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

PRESETS: dict[str, dict[str, Any]] = {
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

# The residuals that demo and studies compare, each with suitable initial values.
CONTENDERS: dict[str, dict[str, Any]] = {
    "post": dict(residual="post", writer_init="zero"),
    "layerscale": dict(residual="layerscale", writer_init="default", init_scale=1e-2),
    "mvsplit": dict(residual="mvsplit", writer_init="default", init_beta=0.03),
}


def preset(name: str, **overrides: Any) -> Config:
    """Return the configuration of a preset with some fields changed."""
    if name not in PRESETS:
        raise UsageError(_unknown("preset", name, PRESETS))
    return from_dict({**PRESETS[name], **overrides})


def from_dict(values: Mapping[str, Any]) -> Config:
    """Return the configuration with the given fields; the others have their defaults."""
    for name in values:
        if name not in FIELDS:
            raise UsageError(_unknown("field", name, FIELDS))
    return Config(**values)


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Return {field: value} from the "field=value" strings of --set."""
    values: dict[str, Any] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--set: expected field=value, got {text!r}")
        if name not in FIELDS:
            raise UsageError("--set: " + _unknown("field", name, FIELDS))
        values[name] = value
    return values


def read(path: str | Path) -> Config:
    """Return the configuration in a JSON file such as the config.json of a run."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}: expected one JSON object with fields, got {type(values).__name__}"
        )
    return from_dict(values)


def differences(
    one: Config, other: Config, ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return {field: (value in one, value in other)} of the fields that differ."""
    pairs = {n: (getattr(one, n), getattr(other, n)) for n in FIELDS if n not in ignored}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def recomputed_blocks(checkpointing: str, depth: int) -> list[bool]:
    """Return whether each block is recomputed in backward; with k/n, block i if i mod n < k."""
    if checkpointing in ("none", "full", "selective"):
        return [checkpointing != "none"] * depth
    k, n = map(int, checkpointing.split("/"))
    return [i % n < k for i in range(depth)]


def _unknown(kind: str, name: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f", did you mean {near[0]}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Expected one of {', '.join(known)}"


def _typed(field: dataclasses.Field[Any], value: object) -> Any:
    """Return a value in the type of its field; a string is parsed, as --set passes it."""
    name, kind = field.name, field.type
    assert isinstance(kind, type)
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
_AT_LEAST = {  # fields by their minimum
    1: "depth dim heads ffn channels size patch text_tokens text_dim steps batch log_every keep",
    0: "threads micro_batch warmup save_every sample_every seed weight_decay clip adam_eps lr",
}


def _check(c: Config) -> None:
    for name, choices in _CHOICES.items():
        if getattr(c, name) not in choices:
            raise UsageError(_unknown(name, getattr(c, name), choices))
    for minimum, names in _AT_LEAST.items():
        for name in names.split():
            if not getattr(c, name) >= minimum:  # also if it is NaN
                raise UsageError(f"{name} must be at least {minimum}, got {getattr(c, name)}")
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


def _check_checkpointing(text: str) -> None:
    if text in ("none", "full", "selective"):
        return
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 0 < int(match[1]) <= int(match[2]):
        raise UsageError(
            "checkpointing must be none, full, selective or k/n with k <= n, e.g. 3/4, "
            f"got {text!r}"
        )
