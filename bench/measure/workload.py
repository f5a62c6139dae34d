"""What is trained while it is measured: a preset's model, its optimizer and one batch."""

import contextlib
import dataclasses

import torch

import mvsplit_ops as mv
from model.config import CONTENDERS, PRESETS, RESIDUALS, parse_overrides, preset
from model.data import open_dataset
from model.nn.dit import build
from model.train.heap import keep_freed_memory
from model.train.optim import make_optimizer
from model.train.step import Batch, draw_batch, gradient_norm, gradients, prepare, update
from mvsplit_ops import _backends

EAGER = "eager"  # the backend `reference`, and nothing compiled
COMPILE = "compile"  # `reference` with every block given to torch.compile
_FUSED = [b for b in _backends.BACKENDS if b != "reference"]
COMPILED = "+compile"  # a backend's operators within blocks given to torch.compile
TRAINABLE = (EAGER, COMPILE, *_FUSED, *(b + COMPILED for b in _FUSED))


def add_preset(p, name="--preset"):
    """The options that say what is trained."""
    p.add_argument(
        name,
        choices=PRESETS,
        metavar="PRESET",
        nargs=None if name.startswith("-") else "?",
        help=f"of {', '.join(PRESETS)} (default: {_default('cpu')}, on a GPU {_default('cuda')})",
    )
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the preset, as python -m model train --help lists them; without data_path "
        "latents are random numbers",
    )


def configuration(args, device):
    """(the preset's name, what of it is overridden) of the options."""
    name = args.preset or _default(device)
    overrides = {"device": device, "probes": False, "data_path": "", **parse_overrides(args.set)}
    if args.threads:
        overrides["threads"] = args.threads
    if args.blocks:
        overrides["depth"] = args.blocks
    of = preset(name, **overrides)
    batch = args.batch or of.micro_batch or of.batch  # one micro-batch: the paper's step
    return name, {**overrides, "batch": batch, "micro_batch": 0}


def _default(device):
    return "collapse100" if device == "cpu" else "dit400-mvsplit"


def with_residual(name, overrides, residual):
    """The configuration of a preset with a residual, and with the start that suits it."""
    if residual not in RESIDUALS:
        raise ValueError(f"--residual: no {residual!r}; there are: {', '.join(RESIDUALS)}")
    return preset(name, **{**CONTENDERS.get(residual, {}), **overrides, "residual": residual})


class Workload:
    """A model with its optimizer on a device, and a batch that stays the same."""

    def __init__(self, config):
        self.config, self.device = config, prepare(config)
        keep_freed_memory()  # here time counts, for every implementation alike
        self.model = build(config, self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.dataset = None if _random(config) else open_dataset(config)
        self.batch = self.draw(0)
        self._compiled = None

    def draw(self, step):
        """A batch: the data's, or random latents where the configuration names no folder."""
        if self.dataset is not None:
            return draw_batch(self.config, self.dataset, step)
        c, generator = self.config, torch.Generator().manual_seed(step)
        image = (c.batch, c.channels, c.size, c.size)
        x0, x1 = (torch.randn(image, generator=generator) for _ in range(2))
        text = torch.randn(c.batch, c.text_tokens, c.text_dim, generator=generator)
        return Batch(x0, x1, torch.rand(c.batch, generator=generator), text)

    def gradients(self):
        return gradients(self.config, self.model, self.batch, self.device)

    def update(self):
        """The norm of the gradients, clipping and AdamW."""
        update(self.config, 0, self.optimizer, gradient_norm(self.optimizer))

    def step(self):
        self.gradients()
        self.update()

    def synchronize(self):
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def running(self, implementation, checkpointing=None):
        """Within the block the model runs as one of TRAINABLE.

        One model serves them all, so that the largest fits: the weights are the same.
        """
        model, blocks, config = self.model, self.model.blocks, self.model.config
        if compiles(implementation):
            model.blocks = self._compiled_blocks()
        model.config = dataclasses.replace(
            config, checkpointing=checkpointing or config.checkpointing
        )
        try:
            with mv.use_backend(_backend(implementation)):
                yield
        finally:
            model.blocks, model.config = blocks, config

    def _compiled_blocks(self):
        if self._compiled is None:
            self._compiled = torch.nn.ModuleList(map(torch.compile, self.model.blocks))
        return self._compiled


def compiles(implementation):
    """Does it give blocks to torch.compile?"""
    return implementation.endswith(COMPILE)


def _backend(implementation):
    if implementation in (EAGER, COMPILE):
        return "reference"
    return implementation.removesuffix(COMPILED)


def implementations(names, device):
    """The names, each of which can train here; ValueError or RuntimeError for one that cannot."""
    names = [EAGER if name == "reference" else name for name in names]
    for name in names:
        if name not in TRAINABLE:
            known = ", ".join(TRAINABLE)
            raise ValueError(f"no implementation {name!r}; there are: {known}")
        if _backend(name) != "reference":
            kind = torch.device(device).type
            _backends.kernel(_backend(name), "swiglu", "_fwd", kind)
            if kind == "cpu" and _backend(name) != "cpu":
                raise RuntimeError(
                    f"{name} only emulates its kernels on a CPU, and there is nothing to time; "
                    "count their bytes with python -m bench traffic"
                )
    return list(dict.fromkeys(names))


def fused_by_default(device):
    """The backends that a comparison has where none is named: those that run on the device."""
    kind = torch.device(device).type
    found = ("cpu",) if kind == "cpu" else ("triton", "cuda")
    return [b for b in found if _backends.missing(b, "swiglu", kind) is None]


def _random(config):
    """Latents that are in no folder are random numbers."""
    return config.data == "latents" and not config.data_path


def tokens(config):
    """Tokens of a step."""
    return config.batch * sum(config.segments)
