"""What each loss promises beyond its formula: limits, scales, dtypes, degenerate weights and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.losses import kurtosis, l_inf, margin, soft_min_max, tail_mean

GRAINS = ["tensor", "channel", 4, 5, 50]
SHAPES = st.lists(st.integers(1, 4), min_size=2, max_size=5)
ANY_GRAIN = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 9))


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_count(weight, grain):
    inputs = weight[0].numel()
    return {"tensor": 1, "channel": len(weight)}.get(grain) or len(weight) * math.ceil(inputs / grain)


def margin_at(value, reduction="max"):
    return lambda weight, grain: margin(
        weight, torch.full((group_count(weight, grain),), value, device=weight.device), grain, reduction
    )


LOSSES = {
    "l_inf": l_inf,
    "margin_max": margin_at(0.3),
    "margin_sum": margin_at(0.3, "sum"),
    "soft_min_max": lambda weight, grain: soft_min_max(weight, 5.0, grain),
    "tail_mean": lambda weight, grain: tail_mean(weight, 0.1, grain),
    "kurtosis": lambda weight, grain: kurtosis(weight, grain=grain),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=SHAPES, grain=ANY_GRAIN, zeros=st.booleans())
def test_value_and_gradient_are_finite_on_odd_shapes_and_zeros(loss, shape, grain, zeros):
    weight = (torch.zeros(shape) if zeros else seeded(*shape)).requires_grad_()
    value = loss(weight, grain)
    value.backward()
    assert value.isfinite()
    assert weight.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("grain", GRAINS)
def test_one_dead_channel_keeps_the_gradient_finite(loss, grain):
    weight = seeded(3, 12)
    weight[1] = 0
    weight.requires_grad_()
    loss(weight, grain).backward()
    assert weight.grad.isfinite().all()


@every_loss
def test_a_vector_is_one_group(loss):
    assert loss(seeded(12), "tensor") == loss(seeded(1, 12), "tensor")


@every_loss
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, grain, dtype):
    weight = seeded(3, 12).to(dtype)
    value = loss(weight, grain)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(weight.float(), grain))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_half_precision_has_its_dtype(loss, dtype):
    weight = seeded(3, 12).to(dtype).requires_grad_()
    loss(weight, "channel").backward()
    assert weight.grad.dtype == dtype


@every_loss
def test_float64_stays_float64(loss):
    assert loss(seeded(3, 12).double(), "channel").dtype == torch.float64


@every_loss
@pytest.mark.parametrize("grain", ["tensor", "channel", 4])
def test_an_empty_weight_raises(loss, grain):
    with pytest.raises(ValueError, match="exclude it from the selection"):
        loss(torch.empty(3, 0), grain)


@every_loss
def test_channels_of_a_vector_raise(loss):
    with pytest.raises(ValueError, match="at least two dimensions"):
        loss(torch.ones(12), "channel")


def test_l_inf_gradient_is_the_sign_on_the_largest_element():
    weight = torch.tensor([[0.5, -3.0], [2.0, 1.0]], requires_grad=True)
    l_inf(weight, "channel").backward()
    assert weight.grad.tolist() == [[0, -1], [1, 0]]


def test_l_inf_shares_its_gradient_between_ties():
    weight = torch.tensor([[2.0, -2.0, 1.0, 0.0]], requires_grad=True)
    l_inf(weight).backward()
    assert weight.grad.tolist() == [[0.5, -0.5, 0, 0]]


@pytest.mark.parametrize("reduction", ["mean", "", "Max", None])
def test_margin_with_another_reduction_raises(reduction):
    with pytest.raises(ValueError, match="use 'max' or 'sum'"):
        margin(seeded(3, 12), torch.ones(1), "tensor", reduction)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_margin_minimised_over_the_margin_is_the_largest_magnitude(reduction):
    weight = seeded(3, 12)
    largest = weight.abs().max()
    levels = torch.cat([torch.linspace(0, 5, 501), largest[None]])
    best = min(margin(weight, level[None], "tensor", reduction) for level in levels)
    assert best.item() == pytest.approx(largest.item(), rel=1e-6)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_margin_is_never_below_l_inf(reduction, grain):
    weight = seeded(3, 12)
    for seed in range(20):
        margins = 3 * seeded(group_count(weight, grain), seed=seed)
        assert margin(weight, margins, grain, reduction) >= l_inf(weight, grain) * (1 - 1e-6)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_margin_ignores_the_sign_of_the_margin(reduction):
    weight, margins = seeded(3, 12), torch.tensor([0.2, 0.9, 5.0])
    assert margin(weight, margins, "channel", reduction) == margin(weight, -margins, "channel", reduction)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 1.0])
def test_soft_min_max_sees_most_of_the_range_of_normal_weights(sigma):
    weight = sigma * seeded(200, 200)
    rms = weight.square().mean().sqrt()
    seen = soft_min_max(weight, 5.0) - rms * math.exp(-5)
    assert 0.85 <= seen / (weight.max() - weight.min()) <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-3, 7.0, 1e6, 1e30])
@pytest.mark.parametrize("grain", ["tensor", 5])
def test_soft_min_max_scales_with_the_weight(grain, scale):
    weight = seeded(3, 12)
    scaled = soft_min_max(scale * weight, 5.0, grain).double() / scale
    assert scaled.item() == pytest.approx(soft_min_max(weight, 5.0, grain).item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 50.0, 1000.0])
def test_soft_min_max_is_finite_at_any_temperature(temperature):
    weight = seeded(3, 12).requires_grad_()
    soft_min_max(weight, temperature).backward()
    assert weight.grad.isfinite().all()


def test_soft_min_max_at_a_high_temperature_is_the_range():
    weight = seeded(3, 12)
    assert soft_min_max(weight, 1000.0).item() == pytest.approx((weight.max() - weight.min()).item(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 49, 100, 300])
def test_tail_mean_of_one_element_is_the_largest(size):
    weight = seeded(1, size)
    assert tail_mean(weight, 1 / size).item() == pytest.approx(l_inf(weight).item(), rel=1e-6)


def test_tail_mean_of_every_element_is_the_mean():
    weight = seeded(3, 12)
    assert tail_mean(weight, 1.0, "channel").item() == pytest.approx(weight.abs().mean(dim=1).sum().item())


@pytest.mark.parametrize(("fraction", "size", "count"), [(0.01, 100, 1), (0.01, 101, 2), (0.07, 100, 7), (0.28, 25, 7)])
def test_tail_mean_takes_the_share_of_the_elements_that_the_fraction_says(fraction, size, count):
    weight = torch.arange(1, size + 1).float()[None]
    assert tail_mean(weight, fraction).item() == pytest.approx(size - (count - 1) / 2)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_tail_mean_with_a_fraction_out_of_range_raises(fraction):
    with pytest.raises(ValueError, match=r"not in \(0, 1\]; 0.01 takes the largest 1 %"):
        tail_mean(seeded(3, 12), fraction)


def test_kurtosis_of_uniform_weights_is_near_its_target():
    uniform = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) - 0.5
    assert kurtosis(uniform).item() == pytest.approx(0, abs=1e-3)


def test_kurtosis_of_normal_weights_is_three():
    assert kurtosis(seeded(200, 200), target=0.0).item() == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e6, 1e20, 1e30])
@pytest.mark.parametrize("grain", GRAINS)
def test_kurtosis_does_not_depend_on_scale(grain, scale):
    weight = seeded(3, 12)
    assert kurtosis(scale * weight, grain=grain).item() == pytest.approx(kurtosis(weight, grain=grain).item(), rel=1e-4)


def test_kurtosis_does_not_depend_on_an_offset():
    weight = seeded(3, 12).double()
    assert kurtosis(weight + 5, grain="channel").item() == pytest.approx(kurtosis(weight, grain="channel").item())


@pytest.mark.parametrize("value", [0.0, 0.1, 3e-20])
@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_kurtosis_of_equal_elements_adds_nothing(size, value):
    assert kurtosis(torch.full((1, size), value)).item() == 0
