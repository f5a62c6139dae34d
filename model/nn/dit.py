"""The paper's single-stream Diffusion Transformer, on mvsplit_ops.

    tokens  [image ; text], plain multi-head attention over both, no mask, no modulation
    time    not an input: the model reads t from the noise in its latents
    block   x = N(x, Attention(x));  x = N(x, SwiGLU(x)),  N a merge with RMSNorm
    heads   RoPE of the image's rows and columns, then QK-Norm, both without weights

Shapes: B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, C channels. The names of
parameters are those of the published 1000-block checkpoint, which loads strictly. arXiv 2605.06169.
"""

import functools
import math
import re

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mvsplit_ops as mv
from model.config import recomputed_blocks
from model.nn.precision import in_precision

MERGE_EPS = 1e-5  # of the RMSNorm of a merge, and of the norms of the inputs
QK_EPS = 1e-6
ROPE_BASE = 10_000
NORMAL_STD = 0.02  # of writer_init "normal"; not stated in the paper


def rope_tables(rows, columns, text_tokens, head_dim, device=None):
    """cos and sin (T, Dh/2), float32: Dh/4 frequencies for rows, then columns; text is not turned.

    Frequencies base^(-4 i / Dh), positions from (0, 0). The model rotates by minus the angle.
    """
    n = head_dim // 4
    frequency = ROPE_BASE ** (-torch.arange(n, dtype=torch.float64, device=device) / n)
    row, column = (torch.arange(m, device=device)[:, None] * frequency for m in (rows, columns))
    angles = torch.zeros(rows * columns + text_tokens, 2 * n, dtype=torch.float64, device=device)
    image = angles[: rows * columns].view(rows, columns, 2, n)
    image[:, :, 0] = row[:, None]
    image[:, :, 1] = column
    return angles.cos().float(), angles.sin().float()


class PlainMerge(nn.Module):
    """RMSNorm(x + scale f): Post-Norm (no scale), LayerScale (D,), ReZero (a scalar)."""

    def __init__(self, shape=None, init_scale=1.0):
        super().__init__()
        self.init_scale = init_scale
        self.scale = None if shape is None else nn.Parameter(torch.empty(shape))

    def reset_parameters(self):
        if self.scale is not None:
            nn.init.constant_(self.scale, self.init_scale)

    def forward(self, x, f, segments, jx=None, carry=False):
        y = mv.residual_rmsnorm(x, f, self.scale, eps=MERGE_EPS)
        return (y, None) if carry else y


def make_merges(config):
    """The merges after attention and after the SwiGLU, by config.residual.

    Two are the paper's negative controls. hard_center holds MV-Split's gains at alpha 0 and beta 1:
    no update ever moves the token mean. attention_only has MV-Split after attention and a plain
    residual after the SwiGLU. Both are our reading of their names.
    """

    def mvsplit(alpha=config.init_alpha, beta=config.init_beta):
        return mv.MVSplitRMSNorm(config.dim, init_alpha=alpha, init_beta=beta, eps=MERGE_EPS)

    makers = {
        "post": [PlainMerge] * 2,
        "layerscale": [lambda: PlainMerge((config.dim,), config.init_scale)] * 2,
        "rezero": [lambda: PlainMerge((), 0.0)] * 2,
        "mvsplit": [mvsplit] * 2,
        "hard_center": [lambda: mvsplit(0.0, 1.0).requires_grad_(False)] * 2,
        "attention_only": [mvsplit, PlainMerge],
    }
    return [make() for make in makers[config.residual]]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def forward(self, x, cos, sin, tap=None):
        """The heads' outputs (B T, D), which `proj` writes to the trunk. tap(q, k) stands for q."""
        B, T, D = x.shape
        rows = x.view(B * T, D)  # a matrix: seven products a block save two views each
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
    def __init__(self, dim, hidden):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)  # gate rows first
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        """silu(gate) * value (B T, F), which `w2` writes to the trunk."""
        return mv.swiglu(self.w13(x.view(-1, x.shape[2])))


class Block(nn.Module):
    """Attention and SwiGLU, each merged into the trunk.

    The merges have the published checkpoint's name whatever the residual. `probe`, where it is set,
    sees queries and keys, what every writer reads and writes, and the block's result (model.taps).
    """

    def __init__(self, config):
        super().__init__()
        self.operator = Attention(config.dim, config.heads)
        self.ffn = SwiGLU(config.dim, config.ffn)
        self.fused_mvsplit_norm1, self.fused_mvsplit_norm2 = make_merges(config)
        self.carry = config.carry_mean
        self.probe = None

    @property
    def writers(self):
        return {"attention": self.operator.proj, "ffn": self.ffn.w2}

    @property
    def merges(self):
        return {"attention": self.fused_mvsplit_norm1, "ffn": self.fused_mvsplit_norm2}

    def forward(self, x, jx, cos, sin, segments):
        """x (B, T, D) and jx, its segment means or None -> the next trunk and its means or None."""
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

    def _merge(self, merge, x, jx, name, writer, h, segments):
        f = writer(h).view_as(x)
        if self.probe is not None:
            f = self.probe.writer(f, name, h, x, segments)
        if self.carry:
            return merge(x, f, segments, jx=jx, carry=True)
        return merge(x, f, segments), None


class InputNorm(nn.Module):
    """RMSNorm of an input; its weight of ones is a buffer, as in the published checkpoint."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("weight", torch.ones(dim))

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), MERGE_EPS)


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, dim):
        super().__init__()
        self.patch_proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x):
        """(B, C, height, width) -> (B, tokens, D)."""
        return self.patch_proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """forward(z, text): z (B, C, size, size) at its unknown time, text (B, tokens, text_dim) -> v.

    Built by `build`, which also initialises. Blocks are recomputed in backward as
    config.checkpointing says.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.channels, config.patch, config.dim)
        self.norm_img_input = InputNorm(config.dim)
        self.norm_text_input = InputNorm(config.dim)
        if config.text_dim != config.dim:
            self.context_proj = nn.Linear(config.text_dim, config.dim, bias=False)
        else:
            self.context_proj = nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_proj = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.register_load_state_dict_pre_hook(_drop_weights_of_ones)

    def forward(self, z, text):
        config, (B, C, height, width) = self.config, z.shape
        rows, columns = height // config.patch, width // config.patch
        image = self.norm_img_input(self.patch_embed(z))
        text = self.norm_text_input(self.context_proj(text))
        x, jx = torch.cat((image, text.to(image.dtype)), dim=1), None
        segments = (rows * columns, text.shape[1])
        cos, sin = rope_tables(rows, columns, text.shape[1], config.head_dim, z.device)
        recompute = recomputed_blocks(config.checkpointing, len(self.blocks))
        for block, again in zip(self.blocks, recompute, strict=True):
            run = self._recomputing(block) if again and torch.is_grad_enabled() else block
            x, jx = run(x, jx, cos, sin, segments)
        v = self.final_proj(x[:, : segments[0]])
        v = v.view(B, rows, columns, config.patch, config.patch, C)
        return v.permute(0, 5, 1, 3, 2, 4).reshape(B, C, height, width)

    def _recomputing(self, block):
        options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
        if self.config.checkpointing == "selective":
            options["context_fn"] = functools.partial(
                create_selective_checkpoint_contexts, keep_matrix_products
            )
        return functools.partial(checkpoint, block, **options)

    def init_weights(self, generator=None):
        """PyTorch's default for every layer, config.writer_init for the writers W_O and W_2."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for t in module.parameters():
                    nn.init.uniform_(t, -bound, bound, generator=generator)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for writer in (w for block in self.blocks for w in block.writers.values()):
            if self.config.writer_init == "zero":
                nn.init.zeros_(writer.weight)
            elif self.config.writer_init == "normal":
                nn.init.normal_(writer.weight, std=NORMAL_STD, generator=generator)


def build(config, device="cpu"):
    """A DiT on a device, its weights drawn from config.seed; on "meta" nothing is allocated."""
    with torch.device("meta"):
        model = in_precision(DiT(config), config)
    if str(device) != "meta":
        model.to_empty(device=device)
        model.init_weights(torch.Generator(device).manual_seed(config.seed))
    return model


# The matrix products and attention: what "selective" keeps. All else is cheap to compute again.
_MATRIX_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm addmm bmm _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu"
    ).split()
)


def keep_matrix_products(ctx, op, *args, **kwargs):
    """The policy of selective checkpointing."""
    if op in _MATRIX_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# Norm weights of the published eager code that its kernels, like ours, lack; ones by construction.
_WEIGHTS_OF_ONES = re.compile(
    r"blocks\.\d+\.(operator\.qk_norm\.(query|key)_norm|fused_mvsplit_norm[12])\.weight$"
)


def without_weights_of_ones(state):
    """A state dict in the layout of the published eager code, without its norm weights of ones."""
    kept = {}
    for name, t in state.items():
        if not _WEIGHTS_OF_ONES.search(name):
            kept[name] = t
        elif not bool((t == 1).all()):
            raise RuntimeError(
                f"{name} must be ones, as in the published checkpoint: merges and QK-Norm have no "
                "weight here"
            )
    return kept


def _drop_weights_of_ones(module, state, prefix, *unused):
    for name in state.keys() - without_weights_of_ones(state).keys():
        del state[name]
