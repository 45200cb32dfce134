"""What `RangeLoss` writes to `.grad`, against float64 losses written the obvious way and differentiated by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_r2.losses import RangeLoss

TAIL, TARGET, SIGMA, STRENGTH = 0.013, 1.8, 0.02, 0.3
LOSSES = {
    "l_inf": {"kind": "l_inf"},
    "margin_max": {"kind": "margin", "margin_reduction": "max"},
    "margin_sum": {"kind": "margin", "margin_reduction": "sum"},
    "soft_min_max": {"kind": "soft_min_max", "temperature": 1.0},
    "tail": {"kind": "tail", "tail_fraction": TAIL},
    "kurtosis": {"kind": "kurtosis", "kurtosis_target": TARGET},
}
LAYERS = {
    "linear": lambda: nn.Linear(257, 300),
    "conv": lambda: nn.Conv2d(32, 64, 3),
    "channels_last": lambda: nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.Linear(257, 300).bfloat16(),
    "conv1d": lambda: Conv1D(300, 257),
}
GRAINS = {"linear": ["tensor", "channel", 257, 64], "conv": ["tensor", "channel", 96, 100]}
CASES = [(layer, grain) for layer, grains in GRAINS.items() for grain in grains]
CASES += [("channels_last", "tensor"), ("channels_last", 100), ("bfloat16", "tensor"), ("bfloat16", "channel")]
CASES += [("conv1d", "tensor"), ("conv1d", "channel"), ("conv1d", 64), ("linear", 200)]

every_loss = pytest.mark.parametrize("loss", LOSSES)


def make(layer, seed=0):
    model = nn.Sequential(LAYERS[layer]())
    with torch.no_grad():
        weight = model[0].weight
        weight.copy_(SIGMA * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def holding(values):
    model = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    model[0].weight = nn.Parameter(values.clone())
    return model


def groups_of(weight, grain):
    if grain == "tensor":
        return [weight.reshape(1, -1)]
    rows = weight.flatten(1)
    size = rows.shape[1] if grain == "channel" else min(grain, rows.shape[1])
    whole = rows.shape[1] // size * size
    return [rows[:, :whole].reshape(-1, size)] + ([rows[:, whole:]] if whole < rows.shape[1] else [])


def obvious(loss, groups, learned):
    magnitudes, level = groups.abs(), learned.abs()
    if loss == "l_inf":
        return magnitudes.amax(1)
    if loss == "margin_max":
        return level + (magnitudes.amax(1) - level).relu()
    if loss == "margin_sum":
        return level + (magnitudes - level[:, None]).relu().sum(1)
    if loss == "tail":
        return magnitudes.topk(max(1, -int(-TAIL * groups.shape[1] // 1)), dim=1).values.mean(1)
    if loss == "kurtosis":
        centred = groups - groups.mean(1, keepdim=True)
        varied = (groups != groups[:, :1]).any(1)
        second = torch.where(varied, centred.square().mean(1), 1)
        return torch.where(varied, ((centred**4).mean(1) / second.square() - TARGET).square(), 0)
    rms = groups.detach().square().mean(1, keepdim=True).sqrt()
    u = groups / torch.where(rms > 0, rms, 1)
    high, low = ((u * torch.softmax(sign * learned[:, None] * u, dim=1)).sum(1) for sign in (1, -1))
    return rms[:, 0] * (high - low + torch.exp(-learned))


def reference(loss, weight, grain, learned):
    """Value, gradient of the weight and that of the learnable values, all float64."""
    weight = weight.detach().double().requires_grad_()
    parts = groups_of(weight, grain)
    learned = torch.zeros(sum(map(len, parts))) if learned is None else learned
    learned = learned.detach().double().requires_grad_()
    split = learned.split([len(part) for part in parts])
    value = sum(obvious(loss, *pair).sum() for pair in zip(parts, split, strict=True))
    return value, *torch.autograd.grad(value, (weight, learned), allow_unused=True)


def build(model, loss, grain, **options):
    """A range loss whose learnable values differ between groups: margins inside and outside, temperatures 2 to 9."""
    range_loss = RangeLoss(model, grain=grain, **LOSSES[loss], **options)
    with torch.no_grad():
        for value in range_loss.parameters():
            ends = (2, 9) if loss == "soft_min_max" else (0.6, 1.1)
            value.mul_(torch.linspace(*ends, len(value)) if len(value) > 1 else sum(ends) / 3)
    return range_loss


def learned_of(range_loss):
    return next(range_loss.parameters(), None)


def written(range_loss, strength=1.0, **options):
    """What one measurement adds to the first weight and to its learnable values."""
    value = range_loss.measure(strength)
    range_loss.accumulate_grad_(**options)
    learned = learned_of(range_loss)
    (module, _), *_ = range_loss.selection.values()
    return value, module.weight.grad, None if learned is None else learned.grad


def relative(actual, expected):
    return ((actual.double() - expected).norm() / (expected.norm() or 1)).item()


def per_place(gradient, weight):
    """Gradient times weight by size: the same whichever of the elements that tie for a tail's last place has it."""
    return (gradient.double() * weight.double()).flatten().sort().values


@every_loss
@pytest.mark.parametrize(("layer", "grain"), CASES)
def test_gradient_agrees_with_autograd_in_float64(loss, layer, grain):
    model = make(layer)
    range_loss = build(model, loss, grain)
    weight = model[0].weight.T if layer == "conv1d" else model[0].weight
    value, expected, expected_learned = reference(loss, weight, grain, learned_of(range_loss))
    measured, gradient, learned = written(range_loss, STRENGTH)
    gradient = gradient.T if layer == "conv1d" else gradient
    assert expected.any()
    if (loss, layer) == ("tail", "bfloat16"):
        gradient, expected = per_place(gradient, weight), per_place(expected, weight)
    assert measured.item() == pytest.approx(STRENGTH * value.item(), rel=2e-6)
    assert model[0].weight.grad.dtype == model[0].weight.dtype
    assert relative(gradient, STRENGTH * expected) <= (4e-3 if layer == "bfloat16" else 2e-5)
    if learned is not None:
        assert relative(learned, STRENGTH * expected_learned) <= 2e-5


@every_loss
@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_and_differentiable_forms_agree(loss, layer):
    gradients = []
    for in_place in (True, False):
        range_loss = build(make(layer), loss, "tensor")
        if in_place:
            value, *_ = written(range_loss)
        else:
            value = range_loss()
            value.backward()
        learned = learned_of(range_loss)
        gradients.append(
            (value, range_loss.selection["0.weight"][0].weight.grad, learned if learned is None else learned.grad)
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9, equal_nan=False)


@every_loss
@pytest.mark.parametrize(("layer", "grain"), [("linear", "tensor"), ("linear", 64), ("conv1d", "channel")])
def test_gradient_is_added_to_what_is_there(loss, layer, grain):
    _, fresh, fresh_learned = written(build(make(layer), loss, grain))
    model = make(layer)
    range_loss = build(model, loss, grain)
    before = torch.randn(model[0].weight.shape, generator=torch.Generator().manual_seed(1)) * fresh.abs().max()
    model[0].weight.grad = before.clone()
    for value in range_loss.parameters():
        value.grad = torch.ones_like(value)
    _, gradient, learned = written(range_loss)
    torch.testing.assert_close(gradient, before + fresh, rtol=1e-5, atol=1e-6 * fresh.abs().max().item())
    if learned is not None:
        torch.testing.assert_close(learned, 1 + fresh_learned)


@every_loss
def test_two_measurements_add_up(loss):
    model = make("linear")
    range_loss = build(model, loss, "channel")
    once = written(range_loss)[1].clone()
    torch.testing.assert_close(written(range_loss)[1], 2 * once)


class Squashed(nn.Module):
    def forward(self, weight):
        return torch.tanh(30 * weight)


@every_loss
def test_gradient_of_a_parametrized_weight_reaches_the_original(loss):
    model = make("linear")
    parametrize.register_parametrization(model[0], "weight", Squashed())
    range_loss = build(model, loss, "channel")
    original = model[0].parametrizations.weight.original
    _, inner, _ = reference(loss, model[0].weight, "channel", learned_of(range_loss))
    expected = inner * 30 * (1 - torch.tanh(30 * original.detach().double()).square())
    range_loss.measure()
    range_loss.accumulate_grad_()
    assert relative(original.grad, expected) <= 2e-5


class Sum(nn.Module):
    def forward(self, base, delta):
        return base + delta

    def right_inverse(self, weight):
        return weight / 2, weight / 2


def test_originals_of_one_weight_get_gradients_of_their_own():
    model = make("linear")
    parametrize.register_parametrization(model[0], "weight", Sum())
    range_loss = build(model, "l_inf", "tensor")
    range_loss.measure()
    range_loss.accumulate_grad_()
    originals = model[0].parametrizations.weight
    before = originals.original1.grad.clone()
    originals.original0.grad.mul_(0.5)
    assert torch.equal(originals.original1.grad, before)


SMALL = st.tuples(st.integers(1, 5), st.integers(1, 40))
ELEMENTS = {
    "ties": st.sampled_from([-1.0, 0.0, 1.0]),
    "few": st.sampled_from([-0.3, 0.0, 0.1, 0.3]),
    "zeros": st.just(0.0),
    "equal": st.just(0.7),
    "any": st.floats(-3, 3, width=32).map(lambda value: value if abs(value) > 1e-3 else 0.0),
}


@st.composite
def special_weights(draw):
    rows, columns = draw(SMALL)
    elements = ELEMENTS[draw(st.sampled_from(sorted(ELEMENTS)))]
    return torch.tensor(draw(st.lists(elements, min_size=rows * columns, max_size=rows * columns))).view(rows, columns)


ANY_GRAIN = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 9))


@every_loss
@settings(max_examples=80, deadline=None, derandomize=True)
@given(weight=special_weights(), grain=ANY_GRAIN, cell=st.sampled_from([1, 2, 128]))
def test_gradient_of_special_weights_agrees_with_autograd(loss, weight, grain, cell):
    """Cells of one or two elements bring such small weights to the search that large ones take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_r2.cells.CELL", cell)
        range_loss = build(holding(weight), loss, grain)
        value, expected, expected_learned = reference(loss, weight, grain, learned_of(range_loss))
        measured, gradient, learned = written(range_loss)
    assert measured.item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
    if loss == "tail":
        gradient, expected = per_place(gradient, weight), per_place(expected, weight)
    scale = max(1.0, expected.abs().max().item())
    # The terms of a spike's kurtosis, which has no gradient, are a thousand times as large
    atol = (1e-3 if loss == "kurtosis" else 1e-4) * scale
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=atol)
    if learned is not None:
        torch.testing.assert_close(learned.double(), expected_learned, rtol=1e-3, atol=1e-4)
