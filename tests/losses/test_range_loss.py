import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_r2.losses import RANGE_LOSSES, RangeLoss, kurtosis, l_inf, margin, soft_min_max, tail_mean

NAMES = ["linear.weight", "conv.weight", "gpt.weight"]
GRAINS = ["tensor", "channel", 3, 4, 50]
LEARNABLE = ["margin", "soft_min_max"]
# Groups of linear (4, 6), conv (5, 2·3·3 = 18) and gpt (its 7 outputs first: (7, 6))
GROUPS = {"tensor": (1, 1, 1), "channel": (4, 5, 7), 3: (8, 30, 14), 4: (8, 25, 14), 50: (4, 5, 7)}

OPTIONS = {"temperature": 3.0, "tail_fraction": 0.2, "kurtosis_target": 2.5}
FREE_FUNCTIONS = {
    "l_inf": l_inf,
    "margin": lambda weight, grain: l_inf(weight, grain),  # what it is at its first margins, max|W|
    "soft_min_max": lambda weight, grain: soft_min_max(weight, 3.0, grain),
    "tail": lambda weight, grain: tail_mean(weight, 0.2, grain),
    "kurtosis": lambda weight, grain: kurtosis(weight, 2.5, grain),
}

every_kind = pytest.mark.parametrize("kind", RANGE_LOSSES)
every_grain = pytest.mark.parametrize("grain", GRAINS)
learnable_kinds = pytest.mark.parametrize("kind", LEARNABLE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 6),
            "linear": nn.Linear(6, 4),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv2d(2, 5, 3),
            "gpt": Conv1D(7, 6),
        }
    )


def weights_of(model):
    """Selected weights with their output channels first, picked by hand."""
    return [model["linear"].weight, model["conv"].weight, model["gpt"].weight.T]


def groups_of(weight, grain):
    rows = weight.detach().flatten(1)
    if grain == "tensor":
        return [rows.flatten()]
    chunks = [row.split(rows.shape[1] if grain == "channel" else grain) for row in rows]
    size = len(chunks[0][0])
    groups = [chunk for row in chunks for chunk in row]
    return [group for group in groups if len(group) == size] + [group for group in groups if len(group) < size]


def learned(loss):
    """Learnable values in the order of the selection."""
    values = dict(loss.named_parameters())
    return [values[f"learnable.{name.replace('.', '/')}"] for name in NAMES]


def test_every_kind_has_a_free_function():
    assert set(FREE_FUNCTIONS) == set(RANGE_LOSSES)


@every_grain
@every_kind
def test_loss_is_the_sum_of_the_free_function_over_the_selection(model, kind, grain):
    expected = sum(FREE_FUNCTIONS[kind](weight, grain) for weight in weights_of(model))
    assert RangeLoss(model, kind, grain, **OPTIONS)().item() == pytest.approx(expected.item(), rel=1e-6)


@every_grain
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_margin_loss_at_other_margins_is_the_sum_of_the_free_function(model, reduction, grain):
    loss = RangeLoss(model, "margin", grain, margin_reduction=reduction)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(torch.linspace(0.1, 0.9, len(parameter)))
    expected = sum(
        margin(weight, level, grain, reduction) for weight, level in zip(weights_of(model), learned(loss), strict=True)
    )
    assert loss().item() == pytest.approx(expected.item(), rel=1e-6)


@every_grain
def test_soft_min_max_loss_at_other_temperatures_is_the_sum_of_the_free_function(model, grain):
    loss = RangeLoss(model, "soft_min_max", grain)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.linspace(1, 9, len(parameter)))
    expected = sum(soft_min_max(weight, a, grain) for weight, a in zip(weights_of(model), learned(loss), strict=True))
    assert loss().item() == pytest.approx(expected.item(), rel=1e-6)


@every_grain
@learnable_kinds
def test_learnable_values_are_one_per_group_of_each_weight(model, kind, grain):
    shapes = {name: tuple(value.shape) for name, value in RangeLoss(model, kind, grain).named_parameters()}
    assert shapes == {
        f"learnable.{name.replace('.', '/')}": (groups,) for name, groups in zip(NAMES, GROUPS[grain], strict=True)
    }


@pytest.mark.parametrize("kind", sorted(set(RANGE_LOSSES) - set(LEARNABLE)))
def test_other_kinds_have_nothing_to_learn_or_save(model, kind):
    assert RangeLoss(model, kind).state_dict() == {}


@learnable_kinds
def test_state_dict_holds_the_learnable_values_alone(model, kind):
    loss = RangeLoss(model, kind)
    assert list(loss.state_dict()) == [name for name, _ in loss.named_parameters()]


@learnable_kinds
def test_no_module_of_the_model_becomes_a_child(model, kind):
    assert not set(RangeLoss(model, kind).modules()) & set(model.modules())


@learnable_kinds
def test_the_model_gets_no_new_parameters(model, kind):
    before = list(model.state_dict())
    RangeLoss(model, kind)
    assert list(model.state_dict()) == before


@learnable_kinds
def test_learnable_values_are_restored_from_a_state_dict(model, kind):
    trained = RangeLoss(model, kind, "channel")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.5)
    resumed = RangeLoss(model, kind, "channel")
    resumed.load_state_dict(trained.state_dict())
    assert resumed() == trained()


@learnable_kinds
def test_a_deep_copy_reads_its_own_learnable_values(model, kind):
    loss = RangeLoss(model, kind)
    twin, before = copy.deepcopy(loss), loss().item()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(10)
    assert twin().item() != pytest.approx(before)


@every_grain
def test_margins_start_at_the_largest_magnitude_of_each_group(model, grain):
    for weight, margins in zip(weights_of(model), learned(RangeLoss(model, "margin", grain)), strict=True):
        assert margins.tolist() == [group.abs().max().item() for group in groups_of(weight, grain)]


def test_temperatures_start_at_the_value_given(model):
    loss = RangeLoss(model, "soft_min_max", "channel", temperature=3)
    assert {value for parameter in loss.parameters() for value in parameter.tolist()} == {3.0}


@pytest.mark.parametrize("kind", [kind for kind in RANGE_LOSSES if kind != "margin"])
def test_gradient_reaches_every_selected_weight(model, kind):
    RangeLoss(model, kind)().backward()
    assert all(model[name.removesuffix(".weight")].weight.grad.any() for name in NAMES)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_gradient_of_margin_reaches_every_weight_that_stands_outside(model, reduction):
    loss = RangeLoss(model, "margin", margin_reduction=reduction)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(0.5)
    loss().backward()
    assert all(model[name.removesuffix(".weight")].weight.grad.any() for name in NAMES)


@every_grain
@learnable_kinds
def test_gradient_reaches_every_learnable_value(model, kind, grain):
    loss = RangeLoss(model, kind, grain)
    loss().backward()
    assert all(parameter.grad.all() for parameter in loss.parameters())


@every_kind
def test_no_gradient_reaches_what_is_not_selected(model, kind):
    RangeLoss(model, kind)().backward()
    others = [model["embedding"].weight, *model["norm"].parameters(), model["linear"].bias, model["gpt"].bias]
    assert all(parameter.grad is None for parameter in others)


def test_weights_are_read_anew_at_every_call(model):
    loss = RangeLoss(model)
    before = loss()
    with torch.no_grad():
        for name in NAMES:
            model[name.removesuffix(".weight")].weight.mul_(2)
    assert loss().item() == pytest.approx(2 * before.item())


def test_a_parametrization_added_later_is_seen(model):
    class Tripled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    loss = RangeLoss(model, include=["linear.weight"])
    before = loss()
    parametrize.register_parametrization(model["linear"], "weight", Tripled())
    assert loss().item() == pytest.approx(3 * before.item())


@every_kind
def test_a_bfloat16_model_gives_a_float32_loss(model, kind):
    loss = RangeLoss(model.bfloat16(), kind)
    assert loss().dtype == torch.float32


@learnable_kinds
def test_learnable_values_of_a_bfloat16_model_are_float32(model, kind):
    assert {parameter.dtype for parameter in RangeLoss(model.bfloat16(), kind).parameters()} == {torch.float32}


def test_selection_options_are_passed_on(model):
    loss = RangeLoss(model, include=["embedding.*", "linear.*", "conv.*"], exclude=["conv.*"], min_numel=25)
    assert list(loss.selection) == ["embedding.weight"]


def test_tied_layers_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert RangeLoss(model)() == l_inf(model[0].weight)


@pytest.mark.parametrize("kind", ["linf", "tail_mean", ""])
def test_an_unknown_kind_raises_with_the_kinds(model, kind):
    with pytest.raises(ValueError, match="use one of l_inf, margin, soft_min_max, tail, kurtosis"):
        RangeLoss(model, kind)


def test_an_unknown_grain_raises(model):
    with pytest.raises(ValueError, match="use 'tensor', 'channel' or a positive group size"):
        RangeLoss(model, grain="row")


def test_an_empty_selection_raises():
    with pytest.raises(ValueError, match="no weight of ReLU is selected"):
        RangeLoss(nn.ReLU())
