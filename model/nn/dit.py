"""Single-stream Diffusion Transformer of arXiv 2605.06169, built on mvsplit_ops.

    tokens  [image ; text], plain multi-head attention over both, no mask, no modulation
    time    not an input: the model infers t from the noise in its latents
    block   x = N(x, Attention(x));  x = N(x, SwiGLU(x)),  N a merge with RMSNorm
    heads   RoPE over the image's rows and columns, then QK-Norm, both without weights

Shapes: B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, C channels. The
parameters have the names of the published 1000-block checkpoint, which loads with strict=True.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mvsplit_ops as mv
from model.config import Config, recomputed_blocks
from model.nn.precision import in_precision
from model.nn.residual import Merge, PlainMerge, make_merges

INPUT_EPS = 1e-5  # of the RMSNorm of the inputs
QK_EPS = 1e-6
ROPE_BASE = 10_000
NORMAL_STD = 0.02  # of writer_init "normal"; not stated in the paper


class BlockProbe(Protocol):
    """Measurements of a block (model.stability.taps). Each method returns its first argument."""

    def attention(self, q: Tensor, k: Tensor, x: Tensor, segments: tuple[int, int]) -> Tensor: ...

    def writer(
        self, f: Tensor, name: str, h: Tensor, x: Tensor, segments: tuple[int, int]
    ) -> Tensor: ...

    def trunk(self, y: Tensor, segments: tuple[int, int]) -> Tensor: ...


def rope_tables(
    rows: int,
    columns: int,
    text_tokens: int,
    head_dim: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, Dh/2), float32: Dh/4 frequencies for rows, then Dh/4 for columns.

    Frequencies are base^(-4 i / Dh), positions start at (0, 0), and text is not rotated. The model
    rotates by minus the angle.
    """
    n = head_dim // 4
    frequency = ROPE_BASE ** (-torch.arange(n, dtype=torch.float64, device=device) / n)
    row, column = (torch.arange(m, device=device)[:, None] * frequency for m in (rows, columns))
    angles = torch.zeros(rows * columns + text_tokens, 2 * n, dtype=torch.float64, device=device)
    image = angles[: rows * columns].view(rows, columns, 2, n)
    image[:, :, 0] = row[:, None]
    image[:, :, 1] = column
    return angles.cos().float(), angles.sin().float()


class Attention(nn.Module):
    """Multi-head attention with RoPE and QK-Norm, without its output projection `proj`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        tap: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the heads' outputs (B T, D), the input of `proj`. tap(q, k) replaces q."""
        B, T, D = x.shape
        rows = x.view(B * T, D)  # a matrix, which saves two views in each of seven products
        q, k, v = (
            proj(rows).view(B, T, self.heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = mv.rope_qk_norm(q, k, cos, sin, eps=QK_EPS, conjugate=True)
        if tap is not None:
            q = tap(q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * T, D)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, without its output projection `w2`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)  # gate rows first
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(gate) * value (B T, F), the input of `w2`."""
        return mv.swiglu(self.w13(x.view(-1, x.shape[2])))


class Block(nn.Module):
    """Attention and SwiGLU, each merged into the trunk.

    The merges have the name of the published checkpoint for every residual. If `probe` is set, it
    receives queries and keys, the input and output of each writer, and the result of the block.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.operator = Attention(config.dim, config.heads)
        self.ffn = SwiGLU(config.dim, config.ffn)
        self.fused_mvsplit_norm1, self.fused_mvsplit_norm2 = make_merges(config)
        self.carry = config.carry_mean
        self.probe: BlockProbe | None = None

    @property
    def writers(self) -> dict[str, nn.Linear]:
        """The projections that write to the trunk, W_O and W_2."""
        return {"attention": self.operator.proj, "ffn": self.ffn.w2}

    @property
    def merges(self) -> dict[str, Merge]:
        return {"attention": self.fused_mvsplit_norm1, "ffn": self.fused_mvsplit_norm2}

    def forward(
        self, x: Tensor, jx: Tensor | None, cos: Tensor, sin: Tensor, segments: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next trunk and its means or None, from x (B, T, D) and its means jx."""
        operator, ffn, probe = self.operator, self.ffn, self.probe
        tap = probe and functools.partial(probe.attention, x=x, segments=segments)
        h = operator(x, cos, sin, tap)
        x, jx = self._merge(
            self.fused_mvsplit_norm1, x, jx, "attention", operator.proj, h, segments
        )
        h = ffn(x)
        x, jx = self._merge(self.fused_mvsplit_norm2, x, jx, "ffn", ffn.w2, h, segments)
        if probe is not None:
            x = probe.trunk(x, segments)
        return x, jx

    def _merge(
        self, merge: Merge, x: Tensor, jx: Tensor | None, name: str, writer: nn.Linear, h: Tensor,
        segments: tuple[int, int],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Merge the output of a writer, whose input is h, into the trunk."""
        f = writer(h).view_as(x)
        if self.probe is not None:
            f = self.probe.writer(f, name, h, x, segments)
        if self.carry:
            return merge(x, f, segments, jx=jx, carry=True)
        return merge(x, f, segments), None


class InputNorm(nn.Module):
    """RMSNorm of an input; its weight of ones is a buffer, as in the published checkpoint."""

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), INPUT_EPS)


class PatchEmbed(nn.Module):
    """Linear embedding of patches: (B, C, height, width) -> (B, tokens, D)."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch_proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.patch_proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """The Diffusion Transformer; `build` creates one with initial weights.

    config.checkpointing selects the blocks that are recomputed in backward.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.channels, config.patch, config.dim)
        self.norm_img_input = InputNorm(config.dim)
        self.norm_text_input = InputNorm(config.dim)
        self.context_proj = (
            nn.Linear(config.text_dim, config.dim, bias=False)
            if config.text_dim != config.dim
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_proj = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.register_load_state_dict_pre_hook(_before_load)

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        """Return the velocity v (B, C, size, size) of z (B, C, size, size) at an unknown time.

        text  embeddings (B, tokens, text_dim) of the captions
        """
        config, (B, C, height, width) = self.config, z.shape
        rows, columns = height // config.patch, width // config.patch
        image = self.norm_img_input(self.patch_embed(z))
        text = self.norm_text_input(self.context_proj(text))
        x, jx = torch.cat((image, text.to(image.dtype)), dim=1), None
        segments = (rows * columns, text.shape[1])
        cos, sin = rope_tables(rows, columns, text.shape[1], config.head_dim, z.device)
        recompute = recomputed_blocks(config.checkpointing, len(self.blocks))
        for block, recomputed in zip(self.blocks, recompute, strict=True):
            run = self._checkpointed(block) if recomputed and torch.is_grad_enabled() else block
            x, jx = run(x, jx, cos, sin, segments)
        v = self.final_proj(x[:, : segments[0]])
        v = v.view(B, rows, columns, config.patch, config.patch, C)
        return v.permute(0, 5, 1, 3, 2, 4).reshape(B, C, height, width)

    def _checkpointed(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls a block and recomputes it in backward."""
        backend = None if torch.compiler.is_compiling() else mv.get_backend()
        if backend is not None:  # on a GPU, another thread recomputes
            block = mv.use_backend(backend)(block)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.config.checkpointing == "selective":
            options["context_fn"] = functools.partial(
                create_selective_checkpoint_contexts, keep_matrix_products
            )
        return functools.partial(checkpoint, block, **options)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise layers with PyTorch's default, and W_O and W_2 by config.writer_init."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for t in module.parameters():
                    nn.init.uniform_(t, -bound, bound, generator=generator)
            elif isinstance(module, (InputNorm, PlainMerge, mv.MVSplitRMSNorm)):
                module.reset_parameters()
        blocks = cast("list[Block]", self.blocks)
        for writer in (w for block in blocks for w in block.writers.values()):
            if self.config.writer_init == "zero":
                nn.init.zeros_(writer.weight)
            elif self.config.writer_init == "normal":
                nn.init.normal_(writer.weight, std=NORMAL_STD, generator=generator)


def build(config: Config, device: torch.device | str = "cpu") -> DiT:
    """Return a DiT on a device, with weights drawn from config.seed; "meta" allocates nothing."""
    with torch.device("meta"):
        model = in_precision(DiT(config), config)
    if str(device) != "meta":
        model.to_empty(device=device)
        model.init_weights(torch.Generator(device).manual_seed(config.seed))
    return model


# Results that checkpointing="selective" keeps; the others are cheap to recompute.
_MATRIX_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm addmm bmm _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu"
    ).split()
)


def keep_matrix_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the policy of selective checkpointing for a call of an operator."""
    if op in _MATRIX_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# Norm weights, always ones, that the published eager code has and its kernels and ours lack.
_WEIGHTS_OF_ONES = re.compile(
    r"blocks\.\d+\.(operator\.qk_norm\.(query|key)_norm|fused_mvsplit_norm[12])\.weight$"
)


def drop_weights_of_ones(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the norm weights of ones of the published eager code."""
    own = {}
    for name, t in state.items():
        if not _WEIGHTS_OF_ONES.search(name):
            own[name] = t
        elif not bool((t == 1).all()):
            raise RuntimeError(
                f"{name} must be ones, as in the published checkpoint: merges and QK-Norm have no "
                "weight here"
            )
    return own


def _before_load(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name in state.keys() - drop_weights_of_ones(state).keys():
        del state[name]
