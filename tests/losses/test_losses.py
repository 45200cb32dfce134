"""Every loss against a slow float64 reference: plain loops over the groups, written from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.losses import kurtosis, l_inf, margin, soft_min_max, tail_mean

GRAINS = ["tensor", "channel", 4, 5, 50]  # of 12 inputs: 4 divides, 5 does not, 50 is larger
SHAPE = (3, 2, 3, 2)
TAIL, TARGET = 0.3, 1.8
TEMPERATURES, MARGINS = (1.0, 9.0), (0.1, 1.5)


def seeded(shape=SHAPE, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(count, ends):
    return torch.linspace(*ends, count, dtype=torch.float64)


def groups_of(weight, grain):
    """Groups in counting order: all whole groups of every channel, then the shorter last ones."""
    channels = [channel.ravel() for channel in weight.double().numpy()]
    if grain == "tensor":
        return [np.concatenate(channels)]
    size = len(channels[0]) if grain == "channel" else min(grain, len(channels[0]))
    whole = len(channels[0]) // size * size
    groups = [channel[start : start + size] for channel in channels for start in range(0, whole, size)]
    return groups + [channel[whole:] for channel in channels if whole < len(channel)]


def count_groups(weight, grain):
    return len(groups_of(weight, grain))


def slow_l_inf(weight, grain):
    return sum(max(abs(value) for value in group) for group in groups_of(weight, grain))


def slow_margin(weight, margins, grain, reduction):
    total = 0.0
    for group, level in zip(groups_of(weight, grain), margins.abs().tolist(), strict=True):
        outside = [max(abs(value) - level, 0.0) for value in group]
        total += level + (max(outside) if reduction == "max" else sum(outside))
    return total


def slow_soft_min_max(weight, temperatures, grain, rms_of=None):
    total = 0.0
    rms_groups = groups_of(weight if rms_of is None else rms_of, grain)
    for group, rms_group, a in zip(groups_of(weight, grain), rms_groups, temperatures.tolist(), strict=True):
        rms = math.sqrt(sum(value**2 for value in rms_group) / len(rms_group))
        u = [value / rms if rms > 0 else 0.0 for value in group]
        p, q = [math.exp(a * value) for value in u], [math.exp(-a * value) for value in u]
        s_max = sum(value * share for value, share in zip(u, p, strict=True)) / sum(p)
        s_min = sum(value * share for value, share in zip(u, q, strict=True)) / sum(q)
        total += rms * (s_max - s_min + math.exp(-a))
    return total


def slow_tail_mean(weight, grain):
    total = 0.0
    for group in groups_of(weight, grain):
        tail = sorted((abs(value) for value in group), reverse=True)[: math.ceil(TAIL * len(group))]
        total += sum(tail) / len(tail)
    return total


def slow_kurtosis(weight, grain):
    total = 0.0
    for group in groups_of(weight, grain):
        mean = sum(group) / len(group)
        second = sum((value - mean) ** 2 for value in group) / len(group)
        fourth = sum((value - mean) ** 4 for value in group) / len(group)
        total += (fourth / second**2 - TARGET) ** 2 if second > 0 else 0.0
    return total


def fast_and_slow(loss, weight, grain):
    """Value of a loss and of its reference, with learnable values that differ between groups."""
    count = count_groups(weight, grain)
    margins, temperatures = spread(count, MARGINS), spread(count, TEMPERATURES)
    return {
        "l_inf": lambda: (l_inf(weight, grain), slow_l_inf(weight, grain)),
        "margin_max": lambda: (margin(weight, margins, grain), slow_margin(weight, margins, grain, "max")),
        "margin_sum": lambda: (margin(weight, margins, grain, "sum"), slow_margin(weight, margins, grain, "sum")),
        "soft_min_max": lambda: (
            soft_min_max(weight, temperatures, grain),
            slow_soft_min_max(weight, temperatures, grain),
        ),
        "tail_mean": lambda: (tail_mean(weight, TAIL, grain), slow_tail_mean(weight, grain)),
        "kurtosis": lambda: (kurtosis(weight, TARGET, grain), slow_kurtosis(weight, grain)),
    }[loss]()


LOSSES = ["l_inf", "margin_max", "margin_sum", "soft_min_max", "tail_mean", "kurtosis"]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_agrees_with_the_slow_reference(loss, grain):
    fast, slow = fast_and_slow(loss, seeded(), grain)
    assert fast.item() == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    grain=st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_value_agrees_with_the_slow_reference_on_odd_shapes(loss, shape, grain, seed):
    fast, slow = fast_and_slow(loss, seeded(shape, seed), grain)
    assert fast.item() == pytest.approx(slow, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, torch.tensor(2.0)])
def test_one_temperature_serves_every_group(temperature):
    fast = soft_min_max(seeded(), temperature, "channel").item()
    assert fast == pytest.approx(slow_soft_min_max(seeded(), torch.full((3,), float(temperature)), "channel"))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(
    "loss",
    [
        l_inf,
        lambda weight, grain: tail_mean(weight, TAIL, grain),
        lambda weight, grain: kurtosis(weight, TARGET, grain),
    ],
    ids=["l_inf", "tail_mean", "kurtosis"],
)
def test_gradcheck_of_losses_without_learnable_values(loss, grain):
    assert torch.autograd.gradcheck(lambda weight: loss(weight, grain), seeded().requires_grad_())


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("grain", GRAINS)
def test_gradcheck_of_margin(grain, reduction):
    margins = spread(count_groups(seeded(), grain), MARGINS).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda weight, margins: margin(weight, margins, grain, reduction), (seeded().requires_grad_(), margins)
    )


@pytest.mark.parametrize("grain", GRAINS)
def test_gradcheck_of_soft_min_max_in_the_temperature(grain):
    temperatures = spread(count_groups(seeded(), grain), TEMPERATURES).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: soft_min_max(seeded(), a, grain), temperatures)


@pytest.mark.parametrize("grain", GRAINS)
def test_gradient_of_soft_min_max_is_that_of_the_reference_with_its_rms_held(grain):
    weight, step = seeded().requires_grad_(), 1e-6
    temperatures = spread(count_groups(weight.detach(), grain), TEMPERATURES)
    soft_min_max(weight, temperatures, grain).backward()

    held = weight.detach()
    expected = torch.zeros_like(held)
    for index in np.ndindex(*held.shape):
        moved = torch.zeros_like(held)
        moved[index] = step
        above, below = (slow_soft_min_max(held + sign * moved, temperatures, grain, rms_of=held) for sign in (1, -1))
        expected[index] = (above - below) / (2 * step)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-8)
