"""Predicted memory, FLOPs and calls, compared with a step of the real model."""

import dataclasses
from pathlib import Path

import pytest

from model.config import preset
from model.data import open_dataset
from model.nn.dit import build
from model.train import memory
from model.train.memory import plan
from model.train.step import compute_gradients, draw_batch
from tests.model.small_models import small_config

README = Path(__file__).parent.parent.parent / "README.md"


def measure_step(config):
    """Return the bytes kept for backward and the peak bytes of the tensors of a real step."""
    model = build(config)
    batch = draw_batch(config, open_dataset(config), 0)
    live, after_forward = memory.LiveBytes(), []
    model.final_proj.register_forward_hook(lambda *unused: after_forward.append(live.bytes))
    with live:
        compute_gradients(config, model, batch, "cpu")
    return after_forward[0], live.peak


@pytest.mark.parametrize("policy", ["none", "3/4", "full", "selective"])
@pytest.mark.parametrize("changes", [{}, {"residual": "layerscale"}, {"carry_mean": True}])
def test_activations_and_peak_match_a_real_step(policy, changes):
    config = small_config(depth=12, checkpointing=policy, **changes)
    expected = plan(config)
    activations, peak = measure_step(config)
    assert expected.activations == pytest.approx(activations, rel=0.01)
    assert max(expected.activations, expected.gradients) + expected.working == pytest.approx(
        peak, rel=0.05
    )


def test_parameters_states_and_calls_of_the_models_of_the_paper():
    p = plan(preset("dit400-mvsplit"))
    assert p.parameters == 5_454_496_896
    assert p.gradients == 4 * p.parameters and p.moments == 8 * p.parameters and p.average == 0
    assert p.weights == 4 * (p.parameters + 2 * 1024)  # the weights of ones of the input norms
    forward = {"rope_qk_norm_fwd": 700, "swiglu_fwd": 700, "mvsplit_rmsnorm_fwd": 1400}
    backward = {"rope_qk_norm_bwd": 400, "swiglu_bwd": 400, "mvsplit_rmsnorm_bwd": 800}
    assert p.calls == {**forward, **backward}
    assert plan(preset("dit1000-mvsplit")).parameters == 13_635_847_296


def test_the_readme_states_the_memory_of_400_blocks():
    gigabytes = round(plan(preset("dit400-mvsplit")).peak() / 1e9)
    assert f"400 blocks of the paper's size need {gigabytes} GB" in README.read_text()


def test_flops_are_those_of_matrix_products_and_attention():
    c = preset("dit400-mvsplit", batch=2, micro_batch=1, checkpointing="none")
    T, D, F, L = sum(c.segments), c.dim, c.ffn, c.depth
    block = 4 * D * D + 3 * D * F
    ends = (c.segments[0] * (c.channels * c.patch**2) * D) * 2
    forward = 2 * (L * (T * block + 2 * T * T * D) + ends)  # per sample
    # backward: twice as many, plus attention scores again, minus the gradient of z
    backward = 2 * forward + L * 2 * T * T * D - ends
    assert plan(c).flops == pytest.approx(c.batch * (forward + backward), rel=1e-6)
    recomputed = plan(dataclasses.replace(c, checkpointing="full")).flops
    assert recomputed == pytest.approx(c.batch * (2 * forward + backward), rel=0.01)


def test_gradients_and_activations_coexist_with_micro_batches():
    wide = dict(batch=32, precision="fp32")  # autocast keeps copies of the weights
    one, two = (plan(preset("dit400-mvsplit", micro_batch=m, **wide)) for m in (32, 16))
    assert (one.micro_batches, two.micro_batches) == (1, 2)
    assert two.activations == pytest.approx(one.activations / 2, rel=0.01)
    state = two.weights + two.moments + two.gradients
    assert two.peak() == state + two.activations + two.working
    assert two.peak(8) == pytest.approx(state / 8 + two.activations + two.working, rel=1e-6)
    assert plan(preset("tiny", ema=0.9)).average == plan(preset("tiny", ema=0.9)).gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
def test_lower_precision_reduces_weights_and_activations(precision):
    p = plan(preset("tiny", precision=precision, depth=16))
    full = plan(preset("tiny", depth=16))
    matrices = sum(t.numel() for t in build(preset("tiny", depth=16), "meta").parameters())
    if precision == "bf16":
        assert p.weights == pytest.approx(2 * matrices, rel=0.1)
    else:
        assert p.weights == full.weights
    share = {"fp32": 1.0, "bf16-autocast": 0.56, "bf16": 0.51}[precision]
    assert p.activations / full.activations == pytest.approx(share, abs=0.06)


def test_a_plan_allocates_no_model():
    before = memory._resident_bytes("VmHWM")
    plan.__wrapped__(preset("dit1000-mvsplit"))
    assert memory._resident_bytes("VmHWM") - before < 400e6  # bytes; the model has 200e9
