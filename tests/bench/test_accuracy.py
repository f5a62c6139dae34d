"""The accuracy rule: what it allows, and what it refuses."""

import pytest
import torch

from bench.cases import CASES, CASES_BY_OP, Shape
from bench.common.accuracy import Inaccurate, Judge, require_accurate, require_case

TINY = Shape(B=2, segments=(9, 4), D=64, H=4, F=24)


def test_twice_the_error_of_eager_code_is_allowed_and_more_is_not():
    exact = torch.ones(4, dtype=torch.float64)
    eager = torch.tensor([1.0, 1.0, 1.0, 1.01])
    require_accurate("op", torch.tensor([1.0, 1.0199, 1.0, 1.0]), eager, exact)
    with pytest.raises(Inaccurate, match="op: largest error 3.00e-02"):
        require_accurate("op", torch.tensor([1.0, 1.03, 1.0, 1.0]), eager, exact)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_and_infinity_are_wrong(wrong):
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(Inaccurate, match="contains NaN or infinity"):
        require_accurate("op", torch.tensor([1.0, wrong]), torch.ones(2), exact)


def test_a_different_shape_is_wrong():
    with pytest.raises(Inaccurate, match=r"expected shape \(2,\), got \(1,\)"):
        require_accurate("op", torch.ones(1), torch.ones(2), torch.ones(2).double())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_every_case_is_accurate_and_a_wrong_kernel_is_not(case):
    inputs = case.inputs(TINY, torch.Generator().manual_seed(0))
    require_case(case, "fused", case.fused(), inputs)

    def wrong_result(*inputs):
        return tuple(t * 1.02 for t in case.fused()(*inputs))

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return 1.02 * g

    def wrong_gradient(*inputs):
        return tuple(WrongGradient.apply(t) for t in case.fused()(*inputs))

    with pytest.raises(Inaccurate, match=f"{case.op}, off, result 0"):
        require_case(case, "off", wrong_result, inputs)
    with pytest.raises(Inaccurate, match=f"{case.op}, off, gradient"):
        require_case(case, "off", wrong_gradient, inputs)


def test_plain_code_rounds_every_operation():
    case = CASES_BY_OP["swiglu"]
    (x,), _, _ = inputs = case.example(TINY)
    gate, up = x.chunk(2, -1)
    (plain,), (once,) = case.eager(*inputs), case.reference(*inputs)
    silu = torch.nn.functional.silu
    assert torch.equal(plain, silu(gate) * up) and not torch.equal(plain, once)
    assert torch.equal(once, (silu(gate.float()) * up.float()).to(x.dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_a_peer_may_err_as_plain_code_does(case):
    judge = Judge(case, case.example(TINY))
    judge.require("plain", case.eager, peer=True)
    if case.op.startswith("mvsplit"):  # it rounds the means, and their gradients with them
        with pytest.raises(Inaccurate, match="plain, gradient"):
            judge.require("plain", case.eager)
