"""What launchers of any backend do before a launch: allocate, check, find strides. No Triton."""

import torch


def accumulator(dtype):
    """Return the dtype in which kernels of an activation dtype compute and store statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new(like, shape, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def require(name, t, shape, *dtypes):
    """The arguments of a backward kernel belong together: it reads no byte beside its tensors."""
    got = None if t is None else (t.dtype, tuple(t.shape))
    if got is None or got[1] != tuple(shape) or got[0] not in dtypes:
        expected = f"{' or '.join(map(str, dict.fromkeys(dtypes)))} {tuple(shape)}"
        raise RuntimeError(f"mvsplit_ops: {name} must be {expected}, got {got}")


def require_parameter(name, p, size, dtype):
    """p is None or a vector of `size`, in float32 or the dtype of the activations."""
    if p is not None:
        require(name, p, (size,), torch.float32, dtype)


def dense(*tensors):
    """Each tensor contiguous, None as it is."""
    return [None if t is None else t.contiguous() for t in tensors]


def with_rows(t):
    """t with neighbours in its last dimension one element apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def rows(t):
    """t with rows (its last dimension) a constant stride apart: as it is, or a copy."""
    return t if row_stride(t) is not None else t.contiguous()


def row_stride(t):
    """The elements from a row (last dimension) to the next; None when it varies."""
    if t.dim() == 1 or t.is_contiguous():
        return t.shape[-1] if t.stride(-1) == 1 else None
    sizes, strides = t.shape[:-1], t.stride()[:-1]
    nested = all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(sizes) - 1))
    return strides[-1] if nested and t.stride(-1) == 1 else None


def tables(pair, x):
    """cos and sin with rows of one stride, and their (sample, token) strides; (), () for none."""
    if not pair:
        return (), ()
    cos, sin = pair
    B, T, _, D = x.shape
    length = max(T, cos.shape[-2])
    expected = (B, length, D // 2) if cos.dim() == 3 else (length, D // 2)
    for name, t in (("cos", cos), ("sin", sin)):
        require(name, t, expected, torch.float32, x.dtype)
    if cos.stride(-1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return (cos, sin), (cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2))


def require_merge(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments):
    """The arguments of mvsplit_rmsnorm_bwd."""
    B, T, D = dy.shape
    if sum(segments) != T:
        raise RuntimeError(f"mvsplit_ops: segments must sum to T = {T}, got {tuple(segments)}")
    for name, t in (("y", kept), ("f", f)):
        require(name, t, dy.shape, dy.dtype)
    for name, t in (("alpha", alpha), ("beta", beta), ("weight", weight)):
        require_parameter(name, t, D, dy.dtype)
    require("rstd", rstd, (B, T), accumulator(dy.dtype))
    for name, t in (("jx", jx), ("jf", jf)):
        require(name, t, (B, len(segments), D), accumulator(dy.dtype))


def require_residual(dy, kept, f, scale, weight, rstd):
    """The arguments of residual_rmsnorm_bwd."""
    B, T, D = dy.shape
    require("y", kept, dy.shape, dy.dtype)
    require("rstd", rstd, (B, T), accumulator(dy.dtype))
    if f is not None or scale is not None or weight is not None:
        require("f", f, dy.shape, dy.dtype)
    for p in (scale, weight):
        require_parameter("a parameter", p, D, dy.dtype)


def require_heads(dys, kept, rstds, weights):
    """The arguments of a backward over the heads of q and k."""
    B, T, _, D = kept[0].shape
    for dy, x, rstd, weight in zip(dys, kept, rstds, weights, strict=True):
        require("dy", dy, (B, T, x.shape[2], D), kept[0].dtype)
        require("y", x, dy.shape, dy.dtype)
        require("rstd", rstd, x.shape[:3], accumulator(x.dtype))
        require_parameter("weight", weight, x.shape[3], x.dtype)


def ceil_div(a, b):
    return -(-a // b)


def power_of_two(n):
    """The least power of two that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(segments, share):
    """Blocks of at most `share` tokens in a sample; none crosses the end of a segment."""
    return sum(ceil_div(tokens, share) for tokens in segments)
