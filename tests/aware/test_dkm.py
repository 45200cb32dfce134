import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_r2.aware import DKM, DKMOptions
from hf_r2.aware.dkm import redundant, reseeded
from hf_r2.codecs import CodecSettings, decode, encode


def make(weight, bits=2, grain="tensor", cluster_dim=1, transpose=False, **options):
    settings = CodecSettings("palette", bits, grain, cluster_dim=cluster_dim)
    step = DKM(weight, settings, DKMOptions(**options), transpose, "layer.weight")
    step.start(weight)
    return step


@pytest.fixture
def weight():
    return 0.05 * torch.randn(24, 30, generator=torch.Generator().manual_seed(0))


def soft(weight, centroids, temperature, iterations=3):
    """Soft k-means of all elements, in float64."""
    values, centroids = weight.double().reshape(-1, 1), centroids.double()
    for _ in range(iterations):
        attention = (-((values - centroids) ** 2) / temperature).softmax(dim=1)
        centroids = (attention * values).sum(dim=0) / attention.sum(dim=0)
    return (attention @ centroids).reshape(weight.shape), centroids


def test_training_computes_the_soft_weight_with_its_gradient(weight):
    step = make(weight, temperature=0.1, tolerance=0.0)
    (start,) = step.centroids.clone()
    latent = weight.clone().requires_grad_()
    result = step(latent)
    upstream = torch.randn(24, 30, generator=torch.Generator().manual_seed(1))
    (result * upstream).sum().backward()
    reference = weight.double().requires_grad_()
    expected, centroids = soft(reference, start, 0.1 * weight.double().var(correction=0))
    (expected * upstream).sum().backward()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(latent.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.centroids[0].double(), centroids, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grain", ["tensor", "channel", 10, 7])
@pytest.mark.parametrize("cluster_dim", [1, 4])
def test_evaluation_computes_what_is_encoded(weight, grain, cluster_dim):
    step = make(weight, 3, grain, cluster_dim).train()
    step(weight.clone().requires_grad_()).sum().backward()
    moved = weight + 0.01
    evaluated = step.eval()(moved)
    assert torch.equal(evaluated, decode(step.encoded(moved)))
    assert torch.equal(step(moved), evaluated)
    assert cluster_dim > 1 or len(evaluated.unique()) <= 8 * len(step.centroids)


def test_the_start_is_the_optimal_palette(weight):
    step = make(weight, 3)
    assert torch.equal(step.centroids, encode(weight, step.settings).codebook["lut"])
    assert torch.equal(step.eval()(weight), decode(encode(weight, step.settings)))


def test_an_output_last_weight_is_compressed_with_its_outputs_first(weight):
    usual, transposed = make(weight, grain="channel"), make(weight.T.contiguous(), grain="channel", transpose=True)
    torch.testing.assert_close(transposed(weight.T.contiguous()), usual(weight).T)
    transposed.load(usual.centroids)
    assert torch.equal(transposed.eval()(weight.T.contiguous()), usual.eval()(weight).T)


def test_before_the_start_the_weight_passes_through(weight):
    step = DKM(weight, CodecSettings("palette", 2, "tensor"), DKMOptions(), False, "w")
    assert step(weight) is weight
    assert step.eval()(weight) is weight


def test_centroids_go_on_from_step_to_step_and_not_within_one(weight):
    step = make(weight, 2, temperature=0.5)
    first = step.centroids.clone()
    once = step(weight.clone().requires_grad_())
    ended = step.centroids.clone()
    assert not torch.equal(ended, first)
    again = step(weight.clone().requires_grad_())  # no gradient has passed yet
    assert torch.equal(once, again)
    again.sum().backward()
    assert not torch.equal(step(weight.clone().requires_grad_()), once)


def test_a_repeated_forward_pass_finds_the_same_start(weight):
    gradients = []
    for repeated in (False, True):
        layer = nn.Linear(30, 24, bias=False)
        layer.weight.data.copy_(weight)
        nn.utils.parametrize.register_parametrization(layer, "weight", make(weight, 2, temperature=0.5), unsafe=True)
        inputs = torch.randn(5, 30, generator=torch.Generator().manual_seed(2)).requires_grad_()
        for _ in range(3):
            outputs = checkpoint(layer, inputs, use_reentrant=False) if repeated else layer(inputs)
            outputs.square().sum().backward()
        gradients.append(layer.parametrizations.weight.original.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_what_they_are(weight, dtype):
    step = make(weight.to(dtype), 2)
    latent = weight.to(dtype).requires_grad_()
    step(latent).sum().backward()
    assert step(latent).dtype == step.eval()(latent).dtype == latent.grad.dtype == dtype
    assert latent.grad.isfinite().all()


def test_constant_weights_and_single_elements_stay_as_they_are():
    for weight in (torch.full((3, 4), 0.25), torch.tensor([[0.5]]), torch.zeros(2, 2)):
        step = make(weight, 2)
        latent = weight.clone().requires_grad_()
        step(latent).sum().backward()
        assert latent.grad.isfinite().all()
        torch.testing.assert_close(step(latent).detach(), weight)
        assert torch.equal(step.eval()(weight), weight)


def test_more_centroids_than_values_keep_all_values():
    weight = torch.tensor([[0.1, 0.1, -0.3, 0.7]])
    step = make(weight, 4, temperature=1e-4)
    for _ in range(5):
        step(weight.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(step.eval()(weight), weight)


def test_a_weight_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"layer\.weight.* NaN or infinite"):
        make(torch.tensor([[1.0, float("nan")]]))


def test_a_compiled_model_computes_the_same_and_leaves_soft_kmeans_out(weight, monkeypatch):
    traced = []
    apart = DKMOptions.cluster

    def spy(*arguments):
        traced.append(torch.compiler.is_compiling())
        return apart(*arguments)

    monkeypatch.setattr(DKMOptions, "cluster", spy)
    steps = make(weight), make(weight)
    found = torch.compile(lambda values: 2 * steps[0](values), backend="eager")(weight)
    assert torch.equal(found, 2 * steps[1](weight))
    assert traced == [False, False]


def test_copies_are_independent(weight):
    step = make(weight)
    other = copy.deepcopy(step)
    step(weight.clone().requires_grad_()).sum().backward()
    assert not torch.equal(step.centroids, other.centroids)


@pytest.mark.parametrize(
    ("bits", "cluster_dim", "expected"),
    [(1, 1, 0.0378), (2, 1, 0.0238), (4, 1, 0.00938), (8, 1, 2.4 / 65536), (4, 4, 0.0378)],
)
def test_the_default_temperature_shrinks_with_the_distances_of_the_centroids(weight, bits, cluster_dim, expected):
    assert make(weight, bits, cluster_dim=cluster_dim).temperature == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_relative_temperature_means_the_same_at_every_scale(weight, scale):
    usual, scaled = make(weight), make(scale * weight)
    torch.testing.assert_close(scaled(scale * weight), scale * usual(weight), rtol=1e-4, atol=1e-6 * scale)


def test_an_absolute_temperature_is_taken_as_it_is(weight):
    variance = weight.var(correction=0).item()
    relative, absolute = make(weight, temperature=0.2), make(weight, temperature=0.2 * variance, absolute=True)
    torch.testing.assert_close(absolute(weight), relative(weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"absolute": True}, "needs a temperature"),
        ({"iterations": 0}, "iterations=0 is not 1 or more"),
        ({"tolerance": -1.0}, "tolerance=-1.0 is not 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DKMOptions(**options)


def test_a_temperature_above_the_variance_is_warned_of(weight):
    (message,) = make(weight, temperature=1.5).warnings(weight)
    assert message.startswith("layer.weight: the temperature")
    assert make(weight).warnings(weight) == []


def test_merged_centroids_are_warned_of(weight):
    step = make(weight)
    step.load(torch.tensor([[-0.1, 0.0, 0.0, 0.1]]))
    (message,) = step.warnings(weight)
    assert "centroids have merged" in message


EQUAL = torch.ones(1, 4)


def test_redundant_centroids_are_those_that_met_another_and_those_without_mass():
    assert redundant(torch.tensor([[0.0, 1.0, 1.0, 3.0]]), EQUAL).tolist() == [[False, False, True, False]]
    masses = torch.tensor([[5.0, 0.0, 7.0, 0.4]])
    assert redundant(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), masses).tolist() == [[False, True, False, True]]


def test_a_redundant_centroid_splits_the_heaviest_cluster():
    masses = torch.tensor([[5.0, 0.0, 7.0, 6.0]])
    assert reseeded(torch.tensor([[0.0, 1.0, 2.0, 4.0]]), masses).tolist() == [[0.0, 1.5, 2.0, 4.0]]
    assert reseeded(torch.tensor([[0.0, 1.0, 1.0, 3.0]]), EQUAL).tolist() == [[0.0, 1.0, 0.5, 3.0]]
    vectors = torch.tensor([[[0.0, 0.0], [9.0, 9.0], [2.0, 0.0], [0.0, 8.0]]])
    assert reseeded(vectors, masses).tolist() == [[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 8.0]]]


def test_groups_without_redundant_centroids_or_without_a_neighbour_stay():
    centroids = torch.tensor([[2.0, 2.0], [0.0, 1.0], [1.0, 1.0]])
    assert torch.equal(reseeded(centroids, torch.ones(3, 2)), centroids)


@pytest.mark.parametrize("start", [[-0.5, 0.0, 0.0, 0.5], [-0.5, 0.0, 0.5, 50.0]], ids=["merged", "empty"])
def test_redundant_centroids_come_back_to_use(start):
    values = torch.linspace(-1, 1, 100)[None]
    step = make(values, 2, temperature=0.01)
    step.load(torch.tensor([start]))
    for _ in range(30):
        step(values.clone().requires_grad_()).sum().backward()
    assert not redundant(step.centroids, step.masses).any()
    assert step.centroids.abs().max() < 1
