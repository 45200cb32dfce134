import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2 import RangeLoss, RangeProjection, stacking
from hf_r2.losses import RANGE_LOSSES

GRAINS = ["tensor", "channel", 3, 6]  # 3 and 6 divide 12 inputs


@pytest.fixture(params=["on_a_cpu", "on_tiles"])
def place(request):
    """Passes as they are made on a CPU, and by the kernels, which Triton's interpreter runs."""
    if request.param == "on_tiles":
        request.getfixturevalue("interpreted_kernels")


@pytest.fixture
def each_alone(monkeypatch):
    monkeypatch.setattr(stacking, "_likeness", lambda local: None)


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
    return len(members([w.weight for w in model], grain)), value, gradients, differentiable


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
def test_stacked_weights_are_measured_and_written_as_each_alone(request, place, model, kind, grain, factors):
    stacked = restricted(copy.deepcopy(model), kind, grain, factors)
    request.getfixturevalue("each_alone")
    alone = restricted(copy.deepcopy(model), kind, grain, factors)
    assert stacked[0] < alone[0] == 7
    torch.testing.assert_close(stacked[1], alone[1])
    assert_same_gradients(stacked[2], alone[2])
    torch.testing.assert_close(stacked[3], alone[3])


@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_stacked_gradients_by_autograd(request, place, model, kind):
    expected = copy.deepcopy(model)
    RangeLoss(model, kind)().backward()
    request.getfixturevalue("each_alone")
    RangeLoss(expected, kind)().backward()
    gradients = ({name: parameter.grad for name, parameter in one.named_parameters()} for one in (model, expected))
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("kind", "strength"), [("clip", 1.0), ("clip", 0.4), ("prox", 0.05)])
def test_stacked_weights_are_projected_as_each_alone(request, place, model, kind, strength, grain):
    expected = copy.deepcopy(model)
    RangeProjection(model, kind, grain).step(strength)
    request.getfixturevalue("each_alone")
    RangeProjection(expected, kind, grain).step(strength)
    for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter)


def members(weights, grain):
    return [some for some, _ in stacking.put_together(weights, grain)]


def test_a_stack_holds_no_more_than_a_piece(monkeypatch):
    monkeypatch.setattr(stacking, "DEVICE_PIECE", 200)
    assert members([torch.randn(8, 12) for _ in range(5)], "channel") == [[0, 1], [2, 3], [4]]


def test_uneven_groups_are_not_stacked():
    assert members([torch.randn(8, 12) for _ in range(3)], 5) == [[0], [1], [2]]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("kind", ["clip", "prox"])
def test_stacked_weights_are_projected_with_strengths_of_their_own(request, place, model, kind, grain):
    expected, strengths = copy.deepcopy(model), torch.linspace(0.02, 0.5, 7)
    projection = RangeProjection(model, kind, grain)
    for _ in range(2):
        projection.step(strengths)
    request.getfixturevalue("each_alone")
    projection = RangeProjection(expected, kind, grain)
    for _ in range(2):
        projection.step(strengths)
    for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter)


def test_on_a_cpu_weights_of_any_shape_are_stacked_unless_they_would_be_copied():
    last = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, 12), last, torch.randn(5), torch.randn(3, 7).T, torch.randn(8, 12).double()]
    half = [torch.randn(8, 12).bfloat16() for _ in range(2)]
    assert members(weights + half, "tensor") == [[0, 1, 2, 3], [4], [5], [6]]
    assert members([*weights[:2], weights[0], weights[3]], "channel") == [[0, 2], [1], [3]]


def test_a_weight_that_is_not_a_number_is_named_whichever_it_is_stacked_with(model):
    loss, projection = RangeLoss(model), RangeProjection(model, "prox")
    with torch.no_grad():
        model[3].weight[2, 1] = float("nan")
    for step in (loss.measure, projection.step):
        with pytest.raises(ValueError, match=r"^3\.weight: NaN"):
            step()


def test_weights_stay_together_while_they_lie_where_they_did(model):
    stacker, weights = stacking.Stacker("tensor"), [layer.weight for layer in model]
    (first,), (again,) = stacker.stack(weights, 1.0), stacker.stack(weights, 0.5)
    assert again.weight is first.weight and again.strength == 0.5
    model[2].weight.data = model[2].weight.detach().clone()
    (moved,) = stacker.stack(weights, 1.0)
    assert moved.weight is not first.weight
    assert moved.weight.blocks()[2].data_ptr() == weights[2].data_ptr()


def test_weights_computed_anew_are_not_kept(model):
    stacker = stacking.Stacker("tensor")
    computed = [layer.weight.detach() * 2 for layer in model]
    (first,), (again,) = stacker.stack(computed, 1.0), stacker.stack(computed, 1.0)
    assert again.weight is not first.weight


@pytest.mark.parametrize("kind", ["l_inf", "margin"])
def test_a_copied_loss_restricts_its_own_model(place, model, kind):
    loss = RangeLoss(model, kind)
    loss.measure()
    loss.accumulate_grad_()
    copied, own = copy.deepcopy((loss, model))
    with torch.no_grad():
        own[0].weight.mul_(3)
    assert copied.measure() > loss.measure()
    assert own[0].weight.grad is not model[0].weight.grad


@pytest.mark.parametrize("kind", ["l_inf", "soft_min_max"])
def test_terms_of_two_losses_keep_their_gradients_until_backward(place, model, kind):
    loss = RangeLoss(model, kind)
    for strength in (1.0, 2.0, 3.0):  # as a device does again what it has done before
        loss.measure(strength)
        loss.accumulate_grad_()
    model.zero_grad()
    twin = copy.deepcopy(model)
    first, second = loss(), loss()
    (first + 2 * second).backward()
    expected = RangeLoss(twin, kind)
    expected.measure(3.0)
    expected.accumulate_grad_()
    for layer, other in zip(model, twin, strict=True):
        torch.testing.assert_close(layer.weight.grad, other.weight.grad)
