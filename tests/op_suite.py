"""The tests that every operator must pass: a test module subclasses OpSuite with its operator.

A variant is a bench.cases.Case: one way to call the operator, for example with or without a weight.
Its inputs are (activations and parameters, constants, keyword arguments).
"""

import contextlib
import copy
import math
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mvsplit_ops as mv
from bench.cases import Case, Shape, in_order
from bench.common.accuracy import (
    cotangent,
    double,
    require_accurate,
    require_case,
    results_and_gradients,
)
from bench.static.traffic import Recorder


def expanded(t):
    """Return a gradient with strides of zero, as of out.sum()."""
    return t.new_ones(()).expand(t.shape)


def every_second(t):
    """Return a gradient whose last dimension has a stride of 2."""
    return exact_cotangent(*t.shape, 2).to(t.dtype)[..., 0]


def transposed(t):
    """Return a (B, T, H, Dh) gradient stored as (B, H, T, Dh), as from attention."""
    dims = (1, 2) if t.dim() > 2 else (0, 1)
    return exact_cotangent(*t.shape).to(t.dtype).transpose(*dims).contiguous().transpose(*dims)


def exact_cotangent(*shape):
    return cotangent(torch.empty(shape), torch.Generator("cpu").manual_seed(1))


@dataclass(frozen=True)
class Effort:
    """The work that a test gives a backend: interpreted kernels are a hundred times slower."""

    examples: int
    tokens: int  # of a segment, at most
    long: tuple[int, int]  # segments of several tasks or programs


EFFORT = dict.fromkeys(("cpu", "triton", "cuda"), Effort(6, 70, (70, 65)))
if not torch.cuda.is_available():
    EFFORT["triton"] = Effort(2, 20, (20, 17))
    EFFORT["cuda"] = Effort(3, 40, (40, 33))
SMALL = Shape(B=2, segments=(5, 1, 3), D=48, H=3, F=20)
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
TINY = {"segments": (2, 1), "D": 12, "F": 6}  # for derivatives element by element
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def variant(op, inputs, call=in_order, **kwargs):
    """Return a way to call an operator; `kwargs` are added to the keyword arguments."""

    def build(shape, generator):
        activations, constants, own_kwargs = inputs(shape, generator)
        return activations, constants, {**own_kwargs, **kwargs}

    return Case(op, op, build, fwd=lambda s: math.nan, bwd=lambda s: math.nan, call=call)


def make(case, shape=SMALL, seed=0, **changes):
    device = torch.get_default_device().type  # conftest's `backend` sets it
    shape = Shape(**{**vars(shape), "device": device, **changes})
    return case.inputs(shape, torch.Generator("cpu").manual_seed(seed))


def assert_equal(results, expected):
    """Check that each tensor has the same bits as the expected one."""
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def all_tensors(function, inputs):
    """Return the results and the gradients of a call, in one list."""
    results, grads = results_and_gradients(function, *inputs)
    return results + grads


def gradients(function, inputs, cotangent_of):
    """Return the gradients when each result t receives cotangent_of(t)."""
    activations, constants, kwargs = inputs
    leaves = [t.detach().requires_grad_() for t in activations]
    outputs = function(leaves, constants, kwargs)
    return torch.autograd.grad(outputs, leaves, [cotangent_of(t) for t in outputs])


def requiring_grad(inputs):
    activations, constants, kwargs = inputs
    return [t.detach().requires_grad_() for t in activations], constants, kwargs


def call_and_list_saved(call, *tensors):
    """Return the results of a call, and addresses of activations that it saves for backward.

    tensors: the activations, which require grad from now on
    """
    for t in tensors:
        t.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = call(*tensors)
    return results, {t.data_ptr() for t in saved if t.numel() == tensors[0].numel()}


@st.composite
def shapes(draw, tokens, *dtypes):
    """Draw B, T, D, H, one to four segments, and sizes that are multiples of no power of two."""
    H = draw(st.integers(1, 3))
    segments = tuple(draw(st.lists(st.integers(1, tokens), min_size=1, max_size=4)))
    return Shape(
        B=draw(st.integers(1, 3)),
        segments=segments,
        D=H * 2 * draw(st.integers(1, 40)),
        H=H,
        F=draw(st.integers(1, 90)),
        dtype=draw(st.sampled_from(dtypes)),
    )


def for_drawn_inputs(backend, *dtypes):
    """Run a function of a shape and a seed on many of them."""

    def decorate(run):
        effort = EFFORT[backend]
        examples = settings(max_examples=effort.examples, deadline=None, derandomize=True)
        drawn = given(shape=shapes(effort.tokens, *dtypes), seed=st.integers(0, 1000))
        examples(drawn(run))()

    return decorate


class OpSuite:
    """Subclasses set `variants`: {name: Case}. Each test runs on every backend (conftest.py).

    A test marked `rotate` takes every pair of its parameters, not every combination.
    """

    variants: dict

    @pytest.fixture(autouse=True)
    def on_each_backend(self, backend):
        pass

    @pytest.fixture
    def case(self, request):
        return self.variants[request.param]

    @pytest.mark.rotate(dtype=PRECISIONS)
    def test_as_accurate_as_eager(self, case, dtype, capability):
        require_case(case, f"{dtype} {capability}", case.fused(), make(case, dtype=dtype))

    @pytest.mark.rotate(dtype=PRECISIONS[1:] + PRECISIONS[:1])
    def test_as_accurate_as_eager_at_whole_vectors(self, case, dtype, backend, capability):
        inputs = make(case, dtype=dtype, segments=EFFORT[backend].long, D=256, H=2, F=128)
        require_case(case, f"{dtype} {capability}", case.fused(), inputs)

    def test_gradcheck(self, case, capability):
        # Element by element, or by random projections if only the instructions differ.
        run, fast = case.fused(), capability != "DEFAULT"
        activations, constants, kwargs = double(make(case, **({} if fast else TINY)))
        leaves = [t.requires_grad_() for t in activations]
        assert torch.autograd.gradcheck(
            lambda *a: run(a, constants, kwargs), leaves, fast_mode=fast
        )

    def test_any_shape_equals_the_definition(self, case, backend):
        @for_drawn_inputs(backend, torch.float64)
        def run(shape, seed):
            self._equals_the_definition(case, double(make(case, shape, seed)))

    def test_any_shape_is_as_accurate_as_eager(self, case, backend):
        @for_drawn_inputs(backend, torch.float32, torch.bfloat16)
        def run(shape, seed):
            # The rule compares largest errors, which depend on chance among few elements.
            assume(shape.T * shape.D >= 1000 and min(shape.D, shape.F) >= 16)
            count = 1 if shape.D >= 64 else 4
            samples = [make(case, shape, seed + i) for i in range(count)]
            require_case(case, str(shape), case.fused(), *samples)

    def test_float64_equals_the_definition(self, case, capability):
        self._equals_the_definition(case, double(make(case)))

    def _equals_the_definition(self, case, inputs):
        exact = all_tensors(case.reference, inputs)
        for g, e in zip(all_tensors(case.fused(), inputs), exact, strict=True):
            assert torch.allclose(g, e, rtol=1e-9, atol=1e-10)

    @pytest.mark.rotate(thorough=(True, False, False))
    def test_opcheck(self, case, thorough):
        checks = OPCHECKS if thorough else ("test_schema", "test_faketensor")
        inputs = make(case, dtype=torch.float32)
        recorder = Recorder()
        with recorder:
            results_and_gradients(case.fused(), *inputs)
        names = {func.__name__.split(".")[0] for func, _, _ in recorder.calls}
        assert names == {f"{case.op}_fwd", f"{case.op}_bwd"}
        for func, args, _ in recorder.calls:
            args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
            opcheck(func, args, test_utils=checks)
        public = []
        case.call(lambda *a, **k: public.append((a, k)), *requiring_grad(inputs))
        for args, kwargs in public:
            op = getattr(torch.ops.mvsplit, case.op).default
            opcheck(op, args, kwargs, test_utils=checks)

    def test_torch_ops_is_the_same_op(self, case):
        inputs = make(case)
        public = case.function(getattr(torch.ops.mvsplit, case.op))
        assert_equal(public(*inputs), case.fused()(*inputs))

    @pytest.mark.rotate(dynamic=(False, True))
    def test_compiled_equals_eager(self, case, dynamic):
        torch.compiler.reset()
        compiled = torch.compile(case.fused(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for segments in ((5, 1, 3), (7, 2, 3)):
            inputs = make(case, segments=segments)
            assert_equal(all_tensors(compiled, inputs), all_tensors(case.fused(), inputs))

    def test_inductor_equals_eager(self):
        case = next(iter(self.variants.values()))
        torch.compiler.reset()
        inputs = make(case)
        compiled = torch.compile(case.fused(), fullgraph=True)
        assert_equal(all_tensors(compiled, inputs), all_tensors(case.fused(), inputs))

    @pytest.mark.rotate(layout=(expanded, every_second, transposed))
    def test_gradient_of_any_layout(self, case, layout):
        inputs = make(case)
        dense = gradients(case.fused(), inputs, lambda t: layout(t).contiguous())
        assert_equal(gradients(case.fused(), inputs, layout), dense)

    def test_strided_inputs(self, case):
        """Views of a packed projection, and columns of a wider tensor."""
        activations, constants, kwargs = make(case, dtype=torch.float32)
        dense = all_tensors(case.fused(), (activations, constants, kwargs))
        for view in (
            lambda t: torch.cat((t, t), -1).narrow(-1, 0, t.shape[-1]) if t.dim() else t,
            lambda t: torch.stack((t, t), -1)[..., 1],
        ):
            leaves = [view(t).detach().requires_grad_() for t in activations]
            assert_equal(leaves, activations)
            outputs = case.fused()(leaves, constants, kwargs)
            g = torch.Generator("cpu").manual_seed(0)
            grads = torch.autograd.grad(outputs, leaves, [cotangent(t, g) for t in outputs])
            assert_equal((*outputs, *grads), dense)

    def test_bit_identical_from_run_to_run_and_for_any_number_of_threads(
        self, case, backend, threads
    ):
        inputs = make(case, segments=EFFORT[backend].long, D=96)
        expected = all_tensors(case.fused(), inputs)
        for count in (1, 2, 3, 2) if backend == "cpu" else (1,):
            threads(count)
            assert_equal(all_tensors(case.fused(), inputs), expected)

    def test_empty_batch(self, case):
        inputs = make(case, B=0)
        results, grads = results_and_gradients(case.fused(), *inputs)
        assert all(t.shape[0] == 0 for t in results)
        for g, t in zip(grads, inputs[0], strict=True):
            assert g.shape == t.shape and not g.count_nonzero()

    def test_does_not_write_its_inputs(self, case):
        inputs = make(case)
        before = copy.deepcopy(inputs)
        results_and_gradients(case.fused(), *inputs)
        assert_equal((*inputs[0], *inputs[1]), (*before[0], *before[1]))

    def test_nan_is_not_hidden(self, case):
        activations, constants, kwargs = make(case)
        activations[0][..., 0] = math.nan
        outputs = case.fused()(activations, constants, kwargs)
        assert outputs[0].isnan().any()

    def test_autocast_casts_only_activations(self, case):
        activations, constants, kwargs = make(case, dtype=torch.float32)
        with torch.autocast(activations[0].device.type, dtype=torch.bfloat16):
            outputs = case.fused()(activations, constants, kwargs)
        expected = case.fused()(
            [t.bfloat16() if t.dim() > 1 else t for t in activations], constants, kwargs
        )
        for a, b in zip(outputs, expected, strict=True):
            assert a.dtype == torch.bfloat16 and torch.equal(a, b)
        with torch.autocast(activations[0].device.type, dtype=torch.bfloat16):
            outputs = case.fused("reference")(activations, constants, kwargs)
        assert {t.dtype for t in outputs} == {torch.bfloat16}

    @pytest.mark.rotate(mode=("reentrant", "non-reentrant", "selective"))
    def test_activation_checkpointing(self, case, mode):
        def policy(ctx, op, *args, **kwargs):
            cheap = op in mv.recompute_cheap_ops()
            assert cheap or op.namespace != "mvsplit" or op.__name__.startswith(f"{case.op}_bwd")
            return CheckpointPolicy.MUST_RECOMPUTE if cheap else CheckpointPolicy.MUST_SAVE

        options = {"use_reentrant": mode == "reentrant"}
        if mode == "selective":
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
        inputs = make(case)

        def checkpointed(activations, constants, kwargs):
            def run(*a):
                return case.fused()(a, constants, kwargs)

            return checkpoint(run, *activations, **options)

        assert_equal(all_tensors(checkpointed, inputs), all_tensors(case.fused(), inputs))

    def test_second_derivative_is_refused_or_right(self, case, backend):
        activations, constants, kwargs = double(make(case, B=1, segments=(2, 1)))
        leaves = [t.requires_grad_() for t in activations]
        outputs = case.fused()(leaves, constants, kwargs)
        grads = torch.autograd.grad(
            sum(t.square().sum() for t in outputs), leaves, create_graph=True
        )
        with pytest.raises(RuntimeError, match=f"{case.op}: .*backend='reference'"):
            torch.autograd.grad(sum(g.sum() for g in grads), leaves)
        if backend != "cpu":
            return  # the reference does not depend on it
        run = case.fused("reference")
        assert torch.autograd.gradgradcheck(lambda *a: run(a, constants, kwargs), leaves)

    def test_gradient_of_one_input_only(self, case):
        activations, constants, kwargs = make(case, dtype=torch.float32)

        def gradient(function, i, tensors, tables):
            leaves = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
            outputs = function(leaves, tables, kwargs)
            generator = torch.Generator("cpu").manual_seed(0)
            torch.autograd.backward(outputs[0], cotangent(outputs[0], generator))
            return torch.zeros_like(leaves[i]) if leaves[i].grad is None else leaves[i].grad

        exact_inputs = double((activations, constants, kwargs))
        for i in range(len(activations)):
            try:
                exact = gradient(case.reference, i, *exact_inputs[:2])
            except RuntimeError:
                continue  # the first result does not depend on this input
            got = gradient(case.fused(), i, activations, constants)
            eager = gradient(case.reference, i, activations, constants)
            require_accurate(f"{case.op}, only input {i}", got, eager, exact)

    @contextlib.contextmanager
    def refuses(self, message, error=ValueError):
        """Expect an error that begins with the name of the operator and contains `message`."""
        op = next(iter(self.variants.values())).op
        with pytest.raises(error, match=f"^{op}: .*{re.escape(message)}"):
            yield
