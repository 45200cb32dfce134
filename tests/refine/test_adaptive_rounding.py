"""AdaRound: its formulas, its optimum by enumeration, and whole models."""

import itertools

import pytest
import torch
from refine_models import build, images
from torch import nn

from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.codecs.uniform import code_limits, dequantize, quantize, unrounded
from hf_r2.refine import adaptive_rounding as module
from hf_r2.refine import adaround
from hf_r2.refine.adaptive_rounding import (
    LayerProblem,
    beta_at,
    rectified_sigmoid,
    round_adaptively,
    start_latent,
    undecided,
)
from hf_r2.selection import output_first, select_weights

KINDS = {
    "restricted": CodecSettings(bits=2),
    "tensor": CodecSettings(bits=3, grain="tensor"),
    "full": CodecSettings(bits=2, grid="full"),
    "midrise": CodecSettings(bits=2, grid="midrise"),
    "affine": CodecSettings(bits=2, symmetric=False),
    "mse": CodecSettings(bits=2, range="mse"),
    "groups": CodecSettings(bits=3, grain=4),
}


def problem_of(weight, seed=0, rows=300, following=()):
    """A linear layer with correlated inputs, and its float outputs."""
    torch.manual_seed(seed)
    out, n = weight.shape
    layer = nn.Linear(n, out)
    inputs = torch.randn(rows, n) @ torch.randn(n, n) / n**0.5 + torch.randn(rows, 1)
    layer.weight.data.copy_(weight)
    return LayerProblem(layer, inputs[:, None], layer(inputs).detach(), list(following))


def every_rounding(weight, settings):
    codebook = quantize(weight, settings)[1]
    down = unrounded(weight, codebook, settings).floor()
    for ups in itertools.product((0.0, 1.0), repeat=weight.numel()):
        up = torch.tensor(ups).view(weight.shape)
        yield dequantize((down + up).clamp(*code_limits(settings)), codebook, settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1])
def test_the_rounding_is_near_the_best_of_all(kind, seed):
    """10 weights of one output: 1,024 roundings, each measured."""
    settings = KINDS[kind]
    weight = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    problem = problem_of(weight, seed)
    nearest = encode(weight, settings)
    best = min(problem.mean_squared_errors(candidate).item() for candidate in every_rounding(weight, settings))
    learned = problem.mean_squared_errors(decode(round_adaptively(weight, nearest, problem, 1000))).item()
    plain = problem.mean_squared_errors(decode(nearest)).item()
    assert best <= learned <= plain
    assert learned <= 1.6 * best + 1e-9


def test_no_channel_is_worse_than_by_nearest_rounding():
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(0))
    problem = problem_of(weight)
    nearest = encode(weight, CodecSettings(bits=3))
    before = problem.mean_squared_errors(decode(nearest))
    for iterations in (1, 300):
        learned = round_adaptively(weight, nearest, problem, iterations)
        assert (problem.mean_squared_errors(decode(learned)) <= before).all()
    assert problem.mean_squared_errors(decode(learned)).sum() < 0.7 * before.sum()
    assert torch.equal(learned.codebook["scale"], nearest.codebook["scale"])


def test_codes_are_the_neighbours_of_the_weight_on_its_grid():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    settings = CodecSettings(bits=4)
    nearest = encode(weight, settings)
    learned = decode(round_adaptively(weight, nearest, problem_of(weight), 300))
    step = nearest.codebook["scale"][:, None]
    assert ((learned - weight).abs() < step * (1 + 1e-5)).all()
    assert not torch.equal(learned, decode(nearest))


def test_what_follows_the_layer_counts():
    """Outputs that ReLU cuts off need not be met, which leaves more freedom for the others."""
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(5))
    problem = problem_of(weight, following=[nn.ReLU()])
    nearest = encode(weight, CodecSettings(bits=2))
    learned = round_adaptively(weight, nearest, problem, 1000)
    outputs = torch.relu(problem.rows[:, 0] @ decode(learned).T + problem.layer.bias.detach())
    expected = (outputs - torch.relu(problem.targets)).square().mean(dim=0)
    torch.testing.assert_close(problem.mean_squared_errors(decode(learned)), expected, rtol=1e-4, atol=1e-6)


def test_the_relaxation_starts_at_the_weight_itself():
    fraction = torch.linspace(0, 0.999, 50)
    torch.testing.assert_close(rectified_sigmoid(start_latent(fraction)), fraction, rtol=1e-4, atol=1e-5)
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_the_regularizer_is_zero_only_where_all_is_decided():
    assert undecided(torch.tensor([0.0, 1, 1]), 7.0).item() == 0
    assert undecided(torch.tensor([0.5, 0.5]), 7.0).item() == 2
    assert undecided(torch.tensor([0.25]), 2.0).item() == pytest.approx(0.75)
    assert [beta_at(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


def test_it_stops_once_every_weight_is_decided(monkeypatch):
    weight = encode(torch.randn(4, 8), CodecSettings(bits=4))
    exact = decode(weight) + 1e-4 * weight.codebook["scale"][:, None]
    seen = []
    monkeypatch.setattr(module, "beta_at", lambda progress: seen.append(progress) or 2.0)
    round_adaptively(exact, weight, problem_of(exact), 1000)
    assert 0 < len(seen) < 700


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v1"])
def test_a_model_is_rounded_in_place_and_beats_nearest_rounding(family, monkeypatch):
    monkeypatch.setattr(module, "_ITERATIONS", 100)
    settings, batches = CodecSettings(bits=3), images()
    model, plain, reference = build(family), build(family), build(family)
    selection = select_weights(model)
    encoded = adaround(model, selection, settings, batches)
    assert encoded.keys() == selection.keys()
    for name, (layer, _) in selection.items():
        assert torch.equal(output_first(layer, layer.weight), decode(encoded[name]))
    for module_, _ in select_weights(plain).values():
        module_.weight.copy_(decode(encode(module_.weight, settings)))
    with torch.no_grad():
        floats, learned, nearest = (torch.cat([m(**b).logits for b in batches]) for m in (reference, model, plain))
    assert (learned - floats).square().mean() < (nearest - floats).square().mean()


def test_rows_are_kept_within_the_cap(monkeypatch):
    monkeypatch.setattr(module, "_ITERATIONS", 2)
    monkeypatch.setattr(module, "_CAPTURED", 40_000)
    sizes = []
    original = module.LayerProblem

    def measured(layer, rows, targets, following):
        sizes.append(rows.nbytes + targets.nbytes)
        return original(layer, rows, targets, following)

    monkeypatch.setattr(module, "LayerProblem", measured)
    model = build("resnet")
    adaround(model, select_weights(model), CodecSettings(bits=3), images())
    assert max(sizes) <= 40_000


def test_weights_of_other_codecs_are_refused_unless_one_is_uniform():
    model = build("resnet")
    with pytest.raises(ValueError, match="'adaround' is for method='uniform'; use 'compensate'"):
        adaround(model, select_weights(model), CodecSettings("palette", 2), images())
