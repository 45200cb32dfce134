"""How strongly `RangeLoss.measure` restricts each weight, and which it leaves out."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_r2 import RangeProjection
from hf_r2.losses import RANGE_LOSSES, RangeLoss
from hf_r2.projection import PROJECTIONS, prox_l_inf

NAMES = ["0.weight", "1.weight", "2.weight"]
every_kind = pytest.mark.parametrize("kind", RANGE_LOSSES)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 4))


def gradients(model, kind, strength=1.0, grad_scale=1.0, **options):
    """Gradients of one measurement: of the weights, and of the learnable values by weight."""
    model.zero_grad()
    loss = RangeLoss(model, kind, "channel", **options)
    with torch.no_grad():
        for value in loss.parameters():
            value.mul_(0.7)
    value = loss.measure(strength)
    loss.accumulate_grad_(grad_scale)
    learned = {name.replace("/", "."): parameter.grad for name, parameter in loss.learnable.items()}
    return value, {name: model.get_parameter(name).grad for name in NAMES}, learned


def assert_scaled(actual, fresh, factors):
    for name, factor in zip(NAMES, factors, strict=True):
        if factor:
            torch.testing.assert_close(actual[name], factor * fresh[name], rtol=1e-5, atol=1e-7)
        else:
            assert actual.get(name) is None


@every_kind
@pytest.mark.parametrize("strength", [torch.tensor([0.5, 2.0, 3.0]), torch.tensor(0.5), 2, 0.0], ids=str)
def test_strength_scales_each_weight_its_own(model, kind, strength):
    _, fresh, fresh_learned = gradients(model, kind)
    values = [gradients(model, kind, include=[name])[0] for name in NAMES]
    each = torch.as_tensor(strength, dtype=torch.float32).expand(3).tolist()
    value, actual, learned = gradients(model, kind, strength)
    assert value.item() == pytest.approx(sum(s * v.item() for s, v in zip(each, values, strict=True)), rel=1e-5)
    for name, factor in zip(NAMES, each, strict=True):
        torch.testing.assert_close(actual[name], factor * fresh[name], rtol=1e-5, atol=1e-7)
        if fresh_learned:
            torch.testing.assert_close(learned[name], factor * fresh_learned[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"1.*": 0.5}, [1, 0.5, 1]),
        ({"*": 3, "2.weight": 0.25}, [3, 3, 0.25]),
        ({"2.weight": 0.25, "*": 3}, [3, 3, 3]),
        ({"0.*": 0, "[02].*": 2.0}, [2, 1, 2]),
        ({"*": 2.0, "1.*": 0}, [2, 0, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("strength", [1.0, 0.5, torch.tensor([1.0, 2.0, 3.0])], ids=str)
@pytest.mark.parametrize("kind", ["l_inf", "margin", "kurtosis"])
def test_the_last_factor_that_matches_counts_and_zero_leaves_out(model, kind, strength, factors, expected):
    kept = [factor for factor in expected if factor]
    if isinstance(strength, torch.Tensor):
        strength = strength[: len(kept)]
    _, fresh, _ = gradients(model, kind)
    each = iter(torch.as_tensor(strength).expand(len(kept)).tolist())
    _, actual, _ = gradients(model, kind, strength, factors=factors)
    assert_scaled(actual, fresh, [factor * next(each) if factor else 0 for factor in expected])


def test_factors_act_on_the_differentiable_form(model):
    fresh = gradients(model, "l_inf")[1]
    model.zero_grad()
    (0.5 * RangeLoss(model, "l_inf", "channel", factors={"1.*": 0, "2.*": 4})()).backward()
    assert_scaled({name: model.get_parameter(name).grad for name in NAMES}, fresh, [0.5, 0, 2])


def test_factors_act_on_the_proximal_step(model):
    before = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    RangeProjection(model, "prox", factors={"0.*": 3, "1.*": 0}).step(0.1)
    for name, t in zip(NAMES, (0.3, 0, 0.1), strict=True):
        torch.testing.assert_close(model.get_parameter(name).detach(), prox_l_inf(before[name], t))
    assert torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("restrict", [RangeLoss, RangeProjection])
@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"1.wieght": 2.0}, r"'1.wieght' matches no weight; near names: \['1.weight'"),
        ({"1.bias": 2.0}, "matches no weight"),
        ({"1.*": -0.5}, r"factor -0.5 of '1.\*' is not a number ≥ 0"),
        ({"1.*": float("nan")}, "factor nan"),
        ({"1.*": float("inf")}, "factor inf"),
        ({"1.*": True}, "factor True"),
        ({"1.*": "2"}, "factor '2'"),
        ({"*": 0}, "all 3 selected weights of Sequential have a strength factor of 0"),
    ],
)
def test_a_mistaken_factor_is_told(model, restrict, factors, message):
    with pytest.raises(ValueError, match=message):
        restrict(model, factors=factors)


@every_kind
def test_a_loss_leaves_frozen_weights_out(model, kind):
    model[1].weight.requires_grad_(False)
    value, actual, _ = gradients(model, kind)
    alone = sum(gradients(model, kind, include=[name])[0] for name in ("0.weight", "2.weight"))
    assert value.item() == pytest.approx(alone.item(), rel=1e-5)
    assert actual["1.weight"] is None
    assert actual["0.weight"].any()


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_projection_leaves_frozen_weights_as_they_are(model, kind):
    model[1].weight.requires_grad_(False)
    before = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    RangeProjection(model, kind, clip=1.1).step(0.5)
    unchanged = [name for name in NAMES if torch.equal(model.get_parameter(name), before[name])]
    assert unchanged == ["1.weight"]


@pytest.mark.parametrize("restrict", [RangeLoss, RangeProjection])
def test_a_model_that_is_frozen_is_refused(model, restrict):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all 3 selected weights of Sequential are frozen"):
        restrict(model)


@every_kind
@pytest.mark.parametrize("grad_scale", [1024.0, torch.tensor(1024.0)], ids=str)
def test_grad_scale_reaches_the_weights_alone(model, kind, grad_scale):
    value, fresh, fresh_learned = gradients(model, kind, 0.5)
    scaled_value, actual, learned = gradients(model, kind, 0.5, grad_scale)
    assert scaled_value == value
    assert_scaled(actual, fresh, [1024] * 3)
    for name, expected in fresh_learned.items():
        torch.testing.assert_close(learned[name], expected)


def test_grad_scale_reaches_a_parametrized_weight(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[0], "weight", Doubled())
    original = model[0].parametrizations.weight.original
    loss = RangeLoss(model, "l_inf", include=["0.weight"])
    loss.measure(0.5)
    loss.accumulate_grad_(8.0)
    largest = original.abs() == original.abs().max()
    assert torch.equal(original.grad, 0.5 * 8 * 2 * largest * original.sign())


@every_kind
def test_measuring_alone_writes_no_gradient_and_builds_no_graph(model, kind):
    loss = RangeLoss(model, kind)
    value = loss.measure(0.5)
    assert value.dtype == torch.float32
    assert not value.requires_grad
    assert value.item() == pytest.approx(0.5 * loss().item(), rel=1e-6)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *loss.parameters()))


@pytest.mark.parametrize("statistic", ["gradient_ratios", "gradient_peaks"])
def test_statistics_of_gradients_come_in_the_order_of_the_weights(statistic):
    # The weight in the middle lies in memory in another order, so that it is not worked on with the others
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    layers[1].weight.data = layers[1].weight.data.to(memory_format=torch.channels_last)
    found = []
    for chosen in (layers, *layers):
        loss = RangeLoss(chosen, "l_inf", "channel")
        loss.measure()
        for index, layer in enumerate(layers):
            layer.weight.grad = torch.full_like(layer.weight, index + 1)
        found.append(getattr(loss, statistic)())
    torch.testing.assert_close(found[0], torch.cat(found[1:]))
