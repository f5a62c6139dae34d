"""Integers and scalars of every type, as token counts and as eps."""

import fractions
import re

import numpy as np
import pytest
import torch

import mvsplit_ops as mv
from tests.op_suite import assert_equal

B, T, D = 2, 7, 8
BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def merge_inputs():
    x, f = torch.randn(B, T, D), torch.randn(B, T, D)
    return x, f, torch.rand(D), torch.rand(D)


COUNTS = {
    "numpy int64": [np.int64(3), np.int64(4)],
    "numpy unsigned": (np.uint8(3), np.uint32(4)),
    "numpy array": np.array([3, 4]),
    "0-d tensors": [torch.tensor(3), torch.tensor(4, dtype=torch.int32)],
    "torch.Size": torch.empty(3, 4).shape,
    "a slice of torch.Size": torch.empty(2, 3, 4).shape[1:],
    "range": range(3, 5),
    "mixed": (3, np.int16(4)),
    "unbound tensor": torch.tensor([3, 4]).unbind(),
}
REFUSED_COUNTS = {
    "bools": [True] * 7,
    "numpy bools": [np.bool_(True)] * 7,
    "0-d bool tensors": [torch.tensor(True)] * 7,
    "floats": (3.0, 4.0),
    "numpy floats": np.array([3.0, 4.0]),
    "0-d float tensors": [torch.tensor(3.0), torch.tensor(4.0)],
    "a tensor": torch.tensor([3, 4]),
    "1-d tensors": [torch.tensor([3]), torch.tensor([4])],
    "a number": 7,
    "a string": "34",
    "None among them": (3, None),
    "nested": ((3, 4),),
    "complex": (3 + 0j, 4),
    "a dict": {3: 0, 4: 0},
}


@pytest.mark.parametrize("name", COUNTS)
@ON_BACKENDS
def test_integers_of_every_type_are_token_counts(name, backend):
    x, f, alpha, beta = merge_inputs()
    expected = mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=(3, 4))
    assert torch.equal(mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=COUNTS[name]), expected)
    y, _ = mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, segments=COUNTS[name])
    assert torch.allclose(y, expected, rtol=1e-6)
    merge = mv.MVSplitRMSNorm(D)
    module_result = merge(x, f, COUNTS[name])
    assert torch.equal(module_result, merge(x, f, (3, 4)))


@pytest.mark.parametrize("name", REFUSED_COUNTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_integer_is_no_token_count(name, backend):
    x, f, alpha, beta = merge_inputs()
    with pytest.raises(ValueError, match="^mvsplit_rmsnorm: segments must be a sequence of token"):
        mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=REFUSED_COUNTS[name], backend=backend)


def test_symbolic_integers_are_token_counts():
    def merge(x, f, alpha, beta):
        n = x.shape[1] // 2
        return mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=(n, x.shape[1] - n))

    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = merge_inputs()
    assert torch.allclose(compiled(*inputs), merge(*inputs), atol=1e-6)


EPSILONS = (
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    torch.tensor(0.25),
    fractions.Fraction(1, 4),
    0.25,
)


def each_norm(eps, backend=None):
    x, f, alpha, beta = merge_inputs()
    q = x.view(B, T, 2, D // 2)
    cos = torch.rand(T, D // 4)
    return [
        mv.mvsplit_rmsnorm(x, f, alpha, beta, eps=eps, backend=backend),
        mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, eps=eps, backend=backend)[0],
        mv.residual_rmsnorm(x, f, eps=eps, backend=backend),
        *mv.qk_norm(q, q, eps=eps, backend=backend),
        *mv.rope_qk_norm(q, q, cos, cos, eps=eps, backend=backend),
    ]


@pytest.mark.parametrize("eps", EPSILONS, ids=lambda e: type(e).__name__)
@ON_BACKENDS
def test_numbers_of_every_type_are_eps(eps, backend):
    torch.manual_seed(0)
    expected = each_norm(0.25)
    torch.manual_seed(0)
    assert_equal(each_norm(eps), expected)


def test_an_integer_eps_is_a_number():
    torch.manual_seed(0)
    expected = each_norm(1.0)
    torch.manual_seed(0)
    assert_equal(each_norm(1), expected)


@pytest.mark.parametrize("eps", [True, None, "1e-5", 1j, torch.ones(2), np.bool_(True)], ids=str)
def test_what_is_no_number_is_no_eps(eps):
    x = torch.randn(B, T, D)
    with pytest.raises(ValueError, match="^residual_rmsnorm: eps must be a number, got"):
        mv.residual_rmsnorm(x, x, eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_64_segments_are_refused_on_every_backend(backend):
    x, a = torch.randn(1, 65, D), torch.rand(D)
    message = "mvsplit_rmsnorm: segments must be at most 64 token counts, got 65"
    for operator in (mv.mvsplit_rmsnorm, mv.mvsplit_rmsnorm_with_mean):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            operator(x, x, a, a, segments=(1,) * 65, backend=backend)


@ON_BACKENDS
def test_many_segments_are_computed(backend):
    ones = 12 if backend == "triton" and not torch.cuda.is_available() else 62  # interpreted
    segments = (1,) * ones + (3, 1)
    x, f = (torch.randn(1, sum(segments), D, dtype=torch.float64) for _ in "xf")
    a = torch.rand(D, dtype=torch.float64)
    exact = mv.reference.mvsplit_rmsnorm(x, f, a, a, segments=segments)
    got = mv.mvsplit_rmsnorm(x, f, a, a, segments=segments)
    assert torch.allclose(got, exact, rtol=1e-10)
