import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2 import RangeLoss, RangeProjection, stacking
from hf_r2.losses import RANGE_LOSSES

GRAINS = ["tensor", "channel", 3, 6]  # 3 and 6 divide 12 inputs


@pytest.fixture
def stack_on_cpu(monkeypatch):
    """Stack as on an accelerator."""
    judge = stacking._stackable

    def stackable(weight, grain, strength):
        return judge(weight.to("meta"), grain, strength)

    monkeypatch.setattr(stacking, "_stackable", stackable)


@pytest.fixture
def model():
    torch.manual_seed(0)
    alike = [nn.Linear(12, 8) for _ in range(3)] + [Conv1D(8, 12) for _ in range(2)]
    return nn.Sequential(*alike, nn.Linear(12, 5), nn.Conv2d(3, 8, 2))


def restricted(model, kind, grain, factors=None):
    loss = RangeLoss(model, kind, grain, factors=factors, margin_reduction="sum", tail_fraction=0.2)
    if kind == "margin":
        for margins in loss.learnable.values():
            margins.data.mul_(0.7)
    value = loss.measure(0.3)
    loss.accumulate_grad_(2.0)
    gradients = {name: parameter.grad for name, parameter in (*model.named_parameters(), *loss.named_parameters())}
    differentiable = RangeLoss(model, kind, grain, factors=factors, margin_reduction="sum", tail_fraction=0.2)()
    return len(stacking.stack_alike([w.weight for w in model], grain, [1.0] * 7)), value, gradients, differentiable


def assert_same_gradients(actual, expected):
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                actual[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name
            )


@pytest.mark.parametrize("factors", [None, {"1.*": 0.5, "3.*": 2.0}])
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_stacked_weights_are_measured_and_written_as_each_alone(request, model, kind, grain, factors):
    alone = restricted(copy.deepcopy(model), kind, grain, factors)
    request.getfixturevalue("stack_on_cpu")
    together = restricted(copy.deepcopy(model), kind, grain, factors)
    assert together[0] < alone[0] == 7
    torch.testing.assert_close(together[1], alone[1])
    assert_same_gradients(together[2], alone[2])
    torch.testing.assert_close(together[3], alone[3])


@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_stacked_gradients_by_autograd(request, model, kind):
    expected = copy.deepcopy(model)
    RangeLoss(expected, kind)().backward()
    request.getfixturevalue("stack_on_cpu")
    RangeLoss(model, kind)().backward()
    gradients = ({name: parameter.grad for name, parameter in one.named_parameters()} for one in (model, expected))
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("kind", "strength"), [("clip", 1.0), ("clip", 0.4), ("prox", 0.05)])
def test_stacked_weights_are_projected_as_each_alone(request, model, kind, strength, grain):
    expected = copy.deepcopy(model)
    RangeProjection(expected, kind, grain).step(strength)
    request.getfixturevalue("stack_on_cpu")
    RangeProjection(model, kind, grain).step(strength)
    for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter)


def test_a_stack_holds_no_more_than_a_piece(stack_on_cpu, monkeypatch):
    monkeypatch.setattr(stacking, "DEVICE_PIECE", 200)
    stacks = stacking.stack_alike([torch.randn(8, 12) for _ in range(5)], "channel", [1.0] * 5)
    assert [stack.members for stack in stacks] == [[0, 1], [2, 3], [4]]


def test_strengths_that_are_tensors_and_uneven_groups_are_not_stacked(stack_on_cpu):
    weights = [torch.randn(8, 12) for _ in range(3)]
    assert len(stacking.stack_alike(weights, "channel", list(torch.ones(3)))) == 3
    assert len(stacking.stack_alike(weights, 5, [1.0] * 3)) == 3
