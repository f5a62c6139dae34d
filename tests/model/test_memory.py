"""What `info` predicts, against what a step of the real model takes."""

from pathlib import Path

import pytest

from model.config import preset
from model.data import open_dataset
from model.nn.dit import build
from model.train import memory as planning
from model.train.memory import plan
from model.train.step import draw_batch, gradients

README = Path(__file__).parent.parent.parent / "README.md"
SMALL = dict(dim=32, heads=2, ffn=48, text_dim=32, threads=1, batch=4)


def real_step(config):
    """(bytes kept for backward, peak bytes) of the tensors of a step that is taken."""
    model = build(config)
    batch = draw_batch(config, open_dataset(config), 0)
    live, kept = planning.LiveBytes(), []
    model.final_proj.register_forward_hook(lambda *unused: kept.append(live.bytes))
    with live:
        gradients(config, model, batch, "cpu")
    return kept[0], live.peak


@pytest.mark.parametrize("policy", ["none", "3/4", "full", "selective"])
@pytest.mark.parametrize("changes", [{}, {"residual": "layerscale"}, {"carry_mean": True}])
def test_activations_and_peak_are_those_of_a_real_step(policy, changes):
    config = preset("tiny", depth=12, checkpointing=policy, **{**SMALL, **changes})
    expected = plan(config)
    kept, peak = real_step(config)
    assert expected.activations == pytest.approx(kept, rel=0.01)
    assert max(expected.activations, expected.gradients) + expected.working == pytest.approx(
        peak, rel=0.05
    )


def test_parameters_states_and_calls_of_the_papers_models():
    p = plan(preset("dit400-mvsplit"))
    assert p.parameters == 5_454_496_896
    assert p.gradients == 4 * p.parameters and p.moments == 8 * p.parameters and p.average == 0
    assert p.weights == 4 * (p.parameters + 2 * 1024)  # the input norms' ones
    forward = {"rope_qk_norm_fwd": 700, "swiglu_fwd": 700, "mvsplit_rmsnorm_fwd": 1400}
    backward = {"rope_qk_norm_bwd": 400, "swiglu_bwd": 400, "mvsplit_rmsnorm_bwd": 800}
    assert p.calls == {**forward, **backward}
    assert plan(preset("dit1000-mvsplit")).parameters == 13_635_847_296


def test_the_readme_says_what_400_blocks_need():
    gigabytes = round(plan(preset("dit400-mvsplit")).peak() / 1e9)
    assert f"400 blocks of the paper's size need {gigabytes} GB" in README.read_text()


def test_flops_are_those_of_the_matrix_products():
    c = preset("dit400-mvsplit", batch=2, micro_batch=1, checkpointing="none")
    T, D, F, L = sum(c.segments), c.dim, c.ffn, c.depth
    block = 4 * D * D + 3 * D * F
    ends = (c.segments[0] * (c.channels * c.patch**2) * D) * 2
    forward = 2 * (L * (T * block + 2 * T * T * D) + ends)  # of a sample
    # backward: twice, but attention's scores are computed again, and z needs no gradient
    backward = 2 * forward + L * 2 * T * T * D - ends
    assert plan(c).flops == pytest.approx(c.batch * (forward + backward), rel=1e-6)
    again = plan(preset("dit400-mvsplit", batch=2, micro_batch=1, checkpointing="full")).flops
    assert again == pytest.approx(c.batch * (2 * forward + backward), rel=0.01)


def test_accumulation_keeps_gradients_beside_activations():
    wide = dict(batch=32, precision="fp32")  # autocast keeps copies of the weights
    one, two = (plan(preset("dit400-mvsplit", micro_batch=m, **wide)) for m in (32, 16))
    assert (one.micro_batches, two.micro_batches) == (1, 2)
    assert two.activations == pytest.approx(one.activations / 2, rel=0.01)
    state = two.weights + two.moments + two.gradients
    assert two.peak() == state + two.activations + two.working
    assert two.peak(8) == pytest.approx(state / 8 + two.activations + two.working, rel=1e-6)
    assert plan(preset("tiny", ema=0.9)).average == plan(preset("tiny", ema=0.9)).gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
def test_sixteen_bits_save_what_they_save(precision):
    p = plan(preset("tiny", precision=precision, depth=16))
    full = plan(preset("tiny", depth=16))
    matrices = sum(t.numel() for t in build(preset("tiny", depth=16), "meta").parameters())
    if precision == "bf16":
        assert p.weights == pytest.approx(2 * matrices, rel=0.1)
    else:
        assert p.weights == full.weights
    share = {"fp32": 1.0, "bf16-autocast": 0.56, "bf16": 0.51}[precision]
    assert p.activations / full.activations == pytest.approx(share, abs=0.06)


def test_nothing_is_allocated():
    before = planning._resident("VmHWM")
    planning.plan.__wrapped__(preset("dit1000-mvsplit"))
    assert planning._resident("VmHWM") - before < 400e6  # bytes, where the model has 200e9
