"""Without a temperature of its own, soft-min-max starts where it sees 90 % of each group's range, and hardly more."""

import pytest
import torch
from torch import nn

from hf_r2.losses import RangeLoss
from hf_r2.losses.soft_min_max import HIGHEST_START, LOWEST_START

SHARE = 0.9
SIZES = {"4e4": (200, 200), "6e5": (750, 800)}


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def laplace(shape, generator):
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def uniform(shape, generator):
    return 2 * torch.rand(shape, generator=generator) - 1


def make(draw, shape, scale):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(scale * draw(shape, torch.Generator().manual_seed(0)))
    return model


def temperatures(model, grain, **options):
    (values,) = RangeLoss(model, "soft_min_max", grain, **options).parameters()
    return values.detach()


def seen(groups, a):
    """Share of max − min that the soft range is, for each row."""
    groups, a = groups.detach().double(), a.double()[:, None]
    u = groups / groups.square().mean(1, keepdim=True).sqrt()
    high, low = ((u * torch.softmax(sign * a * u, dim=1)).sum(1) for sign in (1, -1))
    return (high - low) / (u.amax(1) - u.amin(1))


@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", [normal, laplace, uniform])
def test_a_whole_weight_is_seen_to_nine_tenths_and_hardly_more(draw, size, scale):
    model = make(draw, SIZES[size], scale)
    groups, a = model[0].weight.view(1, -1), temperatures(model, "tensor")
    assert seen(groups, a) >= SHARE - 1e-5
    assert seen(groups, 0.98 * a) < SHARE


@pytest.mark.parametrize("draw", [normal, laplace, uniform])
@pytest.mark.parametrize("grain", ["channel", 64])
def test_each_group_has_a_temperature_of_its_own(grain, draw):
    model = make(draw, (64, 1024), 0.02)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-3, 3, 64)[:, None])
        model[0].weight[5, 7] = 9 * model[0].weight[5].abs().max()
    groups, a = model[0].weight.view(-1, 1024 if grain == "channel" else 64), temperatures(model, grain)
    found = (a > 1.02 * LOWEST_START) & (a < 0.98 * HIGHEST_START)
    assert (seen(groups, a)[a < HIGHEST_START] >= SHARE - 1e-5).all()
    assert (seen(groups, 0.98 * a)[found] < SHARE).all()
    assert found.float().mean() > 0.9


def test_the_temperature_does_not_depend_on_the_scale():
    small, large = (temperatures(make(normal, SIZES["4e4"], scale), "channel") for scale in (1e-6, 1e4))
    torch.testing.assert_close(small, large, rtol=0.02, atol=0)


def test_wider_tails_need_lower_temperatures():
    a = [temperatures(make(draw, SIZES["4e4"], 0.02), "tensor").item() for draw in (uniform, normal, laplace)]
    assert a[0] > a[1] > a[2]


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_group_without_a_range_has_a_finite_temperature(value):
    model = make(normal, (4, 30), 0.02)
    with torch.no_grad():
        model[0].weight[1] = value
    loss = RangeLoss(model, "soft_min_max", "channel")
    loss.measure()
    loss.accumulate_grad_()
    assert temperatures(model, "channel").isfinite().all()
    assert model[0].weight.grad.isfinite().all()


def test_a_temperature_that_is_given_is_kept():
    assert temperatures(make(normal, (4, 30), 0.02), "channel", temperature=2.5).tolist() == [2.5] * 4
