import numpy as np
import pytest
import torch
from torch import nn

from hf_r2 import RangeProjection
from hf_r2.grain import blocks
from hf_r2.losses import RangeLoss
from hf_r2.moments import extremes, extremes_and_rms, require_finite, rms, shapes
from hf_r2.sharding import LocalWeight, run

GRAINS = ["tensor", "channel", 4, 5, 50]  # of 12 inputs: 4 divides, 5 does not, 50 is larger


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_shape(weight):
    """Crest factor and kurtosis from their formulas, in float64."""
    values = weight.double().numpy().ravel()
    rms = np.sqrt(np.mean(values**2))
    centred = values - values.mean()
    return np.abs(values).max() / rms, np.mean(centred**4) / np.mean(centred**2) ** 2


DISTRIBUTIONS = {
    "normal": seeded(300, 257),
    "larger than a piece": seeded(500, 401),
    "uniform": torch.rand(100, 90, generator=torch.Generator().manual_seed(0)) - 0.5,
    "heavy tails": seeded(100, 90) ** 5,
    "one outlier": torch.cat([seeded(100, 90).flatten(), torch.tensor([500.0])])[None],
    "one sign": seeded(100, 90).abs(),
    "off centre": seeded(100, 90) + 2,
    "convolution": seeded(16, 8, 3, 3).to(memory_format=torch.channels_last),
    "transposed": seeded(40, 70).T,
    "two values": torch.tensor([[1.0, -1.0, 1.0, 1.0]]),
    "vector": seeded(50),
}


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-30, 1e30])
@pytest.mark.parametrize("weight", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_shape_agrees_with_numpy(weight, scale):
    weight = weight / weight.abs().max() * scale
    (shape,) = shapes([weight])
    assert (shape.crest_factor.item(), shape.kurtosis.item()) == pytest.approx(numpy_shape(weight), rel=2e-5)
    assert shape.crest_factor.dtype == shape.kurtosis.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shape_of_other_dtypes_is_that_of_their_values(dtype):
    weight = (0.02 * seeded(100, 90)).to(dtype)
    (shape,) = shapes([weight])
    assert (shape.crest_factor.item(), shape.kurtosis.item()) == pytest.approx(numpy_shape(weight), rel=2e-5)


@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3, 3e-20, 1e30, 7.0])
@pytest.mark.parametrize("size", [1, 3, 10, 1000, 123_457])
def test_equal_values_have_crest_factor_one_and_no_kurtosis(size, value):
    (shape,) = shapes([torch.full((1, size), value)])
    assert shape.crest_factor.item() == pytest.approx(1, rel=1e-6)
    assert shape.kurtosis == 0


def test_zeros_have_neither():
    assert shapes([torch.zeros(3, 4)])[0] == (0, 0)


def test_shapes_come_in_the_order_of_the_weights():
    weights = [seeded(20, 30), torch.zeros(2, 2), 5 * seeded(7, 9, seed=1)]
    assert shapes(weights) == [shapes([weight])[0] for weight in weights]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_crest_factor_that_cannot_be_is_nan(broken):
    weight = seeded(200, 300)
    weight[3, 5] = broken
    assert shapes([weight])[0].crest_factor.isnan()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("grain", GRAINS)
def test_rms_and_extremes_agree_with_numpy(grain, scale):
    weight = scale * seeded(6, 3, 2, 2)
    local = LocalWeight(weight, grain)
    sizes, ends = run([rms(local), extremes(local)])
    ((together, size_together),) = run([extremes_and_rms(local, compiled=False)])
    assert torch.equal(together, ends) and torch.equal(size_together, sizes)
    ((fused, fused_size),) = run([extremes_and_rms(local, compiled=True)])
    assert torch.equal(fused, ends)
    torch.testing.assert_close(fused_size, sizes, rtol=1e-6, atol=0)
    for block, size, end in zip(blocks(weight, grain), local.split(sizes), local.split(ends), strict=True):
        values = block.double().numpy()
        np.testing.assert_allclose(size.double(), np.sqrt((values**2).mean(axis=1)), rtol=1e-6)
        assert torch.equal(end, torch.stack([block.amax(dim=1), block.amin(dim=1)], dim=1))


@pytest.mark.parametrize("grain", ["tensor", "channel", 5])
def test_rms_of_half_precision_is_computed_in_float32(grain):
    weight = (1e-4 * seeded(6, 12)).half()
    half, single = run([rms(LocalWeight(values, grain)) for values in (weight, weight.float())])
    assert half.dtype == torch.float32
    assert torch.equal(half, single)


def test_rms_of_mixed_magnitudes_loses_no_group():
    weight = seeded(3, 100) * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    (sizes,) = run([rms(LocalWeight(weight, "channel"))])
    np.testing.assert_allclose(sizes.double(), np.sqrt((weight.double().numpy() ** 2).mean(axis=1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1], "^b: NaN or infinite values. Training has diverged"),
        ([0, 2], "^a, c: NaN"),
        ([0, 1, 2, 3, 4], "^a, b, c and 2 more: NaN"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(broken, message, value):
    values = [torch.tensor([1.0, value if index in broken else 2.0]) for index in range(5)]
    with pytest.raises(ValueError, match=message):
        require_finite("abcde", values)


def test_finite_weights_pass():
    require_finite("ab", [torch.zeros(3), torch.tensor(1e38)])


BROKEN = pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
KINDS = {
    "l_inf": {},
    "margin_max": {"kind": "margin"},
    "margin_sum": {"kind": "margin", "margin_reduction": "sum"},
    "soft_min_max": {"kind": "soft_min_max"},
    "tail": {"kind": "tail"},
    "kurtosis": {"kind": "kurtosis"},
}


@BROKEN
@pytest.mark.parametrize("size", [20, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_a_weight_that_is_not_finite_names_it(kind, size, broken):
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    loss = RangeLoss(model, **KINDS[kind])
    with torch.no_grad():
        model[1].weight[3, 5] = broken
    with pytest.raises(ValueError, match=r"^1\.weight: NaN or infinite values. Training has diverged"):
        loss.measure(0.1)


@BROKEN
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["prox", "clip"])
def test_projecting_a_weight_that_is_not_finite_names_it_and_changes_none(kind, warm, broken):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    projection = RangeProjection(model, kind, clip=1.2)
    with torch.no_grad():
        if warm:
            projection.step(8.0)
        for layer in model:
            layer.weight.add_(0.01 * torch.randn(300, 300))
        model[1].weight[3, 5] = broken
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(ValueError, match=r"^1\.weight: NaN or infinite values"):
        projection.step(0.5)
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=0, equal_nan=True)
