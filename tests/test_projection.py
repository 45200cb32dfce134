import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2 import RangeProjection
from hf_r2.grain import blocks
from hf_r2.projection import clip_to_rms, prox_l_inf


def slow_prox(group, t):
    """Bisect the level whose shavings add up to t, in float64."""
    magnitudes = np.abs(np.asarray(group, dtype=np.float64))
    if magnitudes.sum() <= t:
        return np.zeros_like(magnitudes)
    low, high = 0.0, magnitudes.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(magnitudes - middle, 0).sum() > t else (low, middle)
    return np.clip(group, -high, high)


GROUPS = {
    "one element": [0.7],
    "zeros": [0.0, 0.0, 0.0],
    "all equal": [0.5] * 7,
    "ties at the top": [1.0, -1.0, 1.0, 0.2, 0.0],
    "one outlier": [100.0, 0.1, -0.2, 0.3],
    "tiny": [1e-30, -3e-30, 2e-30],
}


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_prox_matches_the_slow_reference_on_special_groups(group, t):
    step = prox_l_inf(torch.tensor([group], dtype=torch.float64), t)
    np.testing.assert_allclose(step[0].numpy(), slow_prox(group, t), rtol=1e-12, atol=1e-15)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 23),
    grain=st.sampled_from(["tensor", "channel", 1, 4, 100]),
    t=st.floats(0, 10),
    seed=st.integers(0, 2**31),
)
def test_prox_matches_the_slow_reference_at_every_grain(rows, columns, grain, t, seed):
    weight = torch.randn(rows, columns, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = prox_l_inf(weight, t, grain)
    for before, after in zip(blocks(weight, grain), blocks(step, grain), strict=True):
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new.numpy(), slow_prox(old.numpy(), t), rtol=1e-9, atol=1e-12)


def test_prox_lowers_its_objective_more_than_any_nearby_point():
    weight = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = prox_l_inf(weight, 0.8)

    def objective(point):
        return 0.5 * (point - weight).square().sum() + 0.8 * point.abs().max()

    for seed in range(50):
        nearby = step + 0.01 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert objective(step) <= objective(nearby)


def test_prox_refuses_a_negative_step():
    with pytest.raises(ValueError, match="t=-1"):
        prox_l_inf(torch.ones(2, 2), -1)


@pytest.mark.parametrize("grain", ["tensor", "channel", 4])
def test_clip_limits_every_group_to_its_own_rms(grain):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    for before, after in zip(blocks(weight, grain), blocks(clip_to_rms(weight, 1.2, grain), grain), strict=True):
        limit = 1.2 * before.square().mean(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(after, before.clamp(-limit, limit), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_is_computed_in_float32(dtype):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in (lambda w: clip_to_rms(w, 1.3), lambda w: prox_l_inf(w, 0.5)):
        assert step(weight).dtype == dtype
        assert torch.equal(step(weight), step(weight.float()).to(dtype))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.conv1d = Conv1D(3, 4)
        self.embedding = nn.Embedding(5, 4)


@pytest.mark.parametrize("kind", ["clip", "prox"])
def test_only_selected_weights_change_and_in_place(kind):
    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    storage = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    RangeProjection(model, kind, clip=1.1).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"linear.weight", "conv1d.weight"}
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == storage


def test_conv1d_channels_are_its_columns():
    model = Model()
    before = model.conv1d.weight.detach().clone()
    RangeProjection(model, "prox", grain="channel", include=["conv1d.*"]).step(0.01)
    assert torch.equal(model.conv1d.weight, prox_l_inf(before.T, 0.01, "channel").T)


@pytest.mark.parametrize(
    ("kind", "clip", "strength"), [("clip", float("inf"), 1.0), ("clip", 1.5, 0.0), ("prox", 1.5, 0.0)]
)
def test_no_restriction_changes_no_bit(kind, clip, strength):
    model = Model()
    before = model.linear.weight.detach().clone()
    RangeProjection(model, kind, clip=clip).step(strength)
    assert torch.equal(model.linear.weight, before)


def test_partial_clip_goes_part_of_the_way():
    model = Model()
    before = model.linear.weight.detach().clone()
    RangeProjection(model, "clip", clip=1.1).step(0.25)
    torch.testing.assert_close(model.linear.weight.detach(), torch.lerp(before, clip_to_rms(before, 1.1), 0.25))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "crop"}, "unknown projection 'crop'"), ({"clip": 1.0}, "clip=1.0"), ({"grain": "row"}, "unknown grain")],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        RangeProjection(Model(), **arguments)
