"""What a process holds of a weight, and how routines are driven; over processes: tests/distributed."""

import pytest
import torch
from torch import nn

from hf_r2 import RangeLoss, RangeProjection
from hf_r2.grain import blocks
from hf_r2.sharding import LocalWeight, run

GRAINS = ["tensor", "channel", 4, 5]  # of 36 inputs, 4 divides, 5 does not
LAYOUTS = {
    "plain": lambda w: w,
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "part of another": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "half": lambda w: w.bfloat16(),
    "double": lambda w: w.double(),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def seeded(seed=0):
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@every_layout
@pytest.mark.parametrize("grain", GRAINS)
def test_blocks_of_any_layout_hold_the_groups(grain, layout):
    weight = layout(seeded())
    for found, expected in zip(LocalWeight(weight, grain).blocks(), blocks(weight, grain), strict=True):
        assert found.is_contiguous()
        assert found.dtype == expected.dtype
        if grain == "tensor":  # in any order
            found, expected = found.sort(dim=1).values, expected.sort(dim=1).values
        assert torch.equal(found, expected)


@every_layout
@pytest.mark.parametrize("target_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grain", GRAINS)
def test_a_target_of_any_layout_is_changed_where_the_weight_is(grain, layout, target_layout):
    weight, target = layout(seeded()), target_layout(torch.zeros(8, 4, 3, 3))
    local = LocalWeight(weight, grain)

    def add(parts):
        for part, block in zip(parts, local.blocks(), strict=True):
            part.add_(block)

    local.update(target, add)
    torch.testing.assert_close(target.double(), weight.double(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("grain", ["channel", 2])
def test_channels_of_a_vector_are_refused(grain):
    with pytest.raises(ValueError, match="at least two dimensions"):
        LocalWeight(torch.ones(6), grain).blocks()


CHANGES = {
    "other values": lambda layer: layer.weight.data.mul_(3),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(seeded(1))),
    "another storage": lambda layer: setattr(layer.weight, "data", seeded(1)),
    "other strides": lambda layer: setattr(
        layer.weight, "data", seeded(1).contiguous(memory_format=torch.channels_last)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("grain", ["tensor", "channel"])
def test_every_step_reads_the_weights_anew(grain, change):
    layer = nn.Conv2d(4, 8, 3)
    loss, projection = RangeLoss(layer, grain=grain), RangeProjection(layer, "prox", grain)
    loss.measure()
    loss.accumulate_grad_()
    projection.step(0.01)
    change(layer)
    layer.weight.grad = None
    fresh = nn.Conv2d(4, 8, 3)
    fresh.weight.data.copy_(layer.weight.data)
    for one in (loss, RangeLoss(fresh, grain=grain)):
        one.measure()
        one.accumulate_grad_()
    torch.testing.assert_close(layer.weight.grad, fresh.weight.grad)
    projection.step(0.01)
    RangeProjection(fresh, "prox", grain).step(0.01)
    torch.testing.assert_close(layer.weight, fresh.weight)


def test_a_routine_that_pauses_goes_on_when_all_others_have_come_as_far():
    steps = []

    def routine(name, pauses):
        for step in range(pauses):
            steps.append((step, name))
            yield
        return name

    assert run([routine("a", 1), routine("b", 3), routine("c", 2)]) == ["a", "b", "c"]
    assert steps == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (2, "b")]
