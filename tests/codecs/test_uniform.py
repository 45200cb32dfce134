import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import CodecSettings
from hf_r2.codecs.uniform import codebook_like, dequantize, quantize

ALL_BITS = range(2, 9)
KINDS = {
    "restricted": {"grid": "restricted"},
    "full": {"grid": "full"},
    "midrise": {"grid": "midrise"},
    "affine": {"symmetric": False},
}
GRAINS = ["tensor", "channel", 1, 4, 7, 18, 100]
DATA = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "one outlier": lambda rng, n: np.append(rng.standard_normal(n - 1), 50),
    "outliers": lambda rng, n: np.append(rng.standard_normal(n - n // 100), rng.choice([-50, 47], n // 100)),
}


def make_settings(kind, bits, grain="channel", **options):
    return CodecSettings("uniform", bits, grain, **KINDS[kind], **options)


def round_trip(weight, config):
    return dequantize(*quantize(weight, config), config)


def sample(data, n, seed=0):
    return torch.tensor(DATA[data](np.random.default_rng(seed), n), dtype=torch.float32)[None]


def min_max_step(group, kind, bits):
    largest = abs(group).max()
    if kind == "restricted":
        return largest / (2 ** (bits - 1) - 1)
    if kind == "full":
        return largest / ((2**bits - 1) / 2)
    if kind == "midrise":
        return largest / 2 ** (bits - 1)
    return (max(group.max(), 0) - min(group.min(), 0)) / (2**bits - 1)


def multiples_of_step(group, kind, bits):
    """The levels in units of the step, lowest first."""
    half = 2 ** (bits - 1)
    if kind == "restricted":
        return np.arange(1 - half, half, dtype=float)
    if kind == "full":
        return np.arange(-half, half, dtype=float)
    if kind == "midrise":
        return np.arange(-half, half) + 0.5
    zero = round(-min(group.min(), 0) / min_max_step(group, kind, bits))
    return np.arange(2.0 * half) - zero


def groups_of(weight, grain):
    """Each group as a list of positions in the flattened weight, by counting."""
    inputs = weight[0].numel()
    if grain == "tensor":
        return [list(range(weight.numel()))]
    size = inputs if grain == "channel" else grain
    return [
        [channel * inputs + i for i in range(start, min(start + size, inputs))]
        for channel in range(len(weight))
        for start in range(0, inputs, size)
    ]


def squared_error(weight, decoded):
    return float((weight.double() - decoded.double()).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("grain", GRAINS)
def test_codes_decode_to_the_nearest_level_of_their_group(kind, bits, grain):
    torch.manual_seed(bits)
    weight = torch.randn(5, 2, 3, 3) * torch.tensor([0.01, 1, 3, 100, 0.3]).view(5, 1, 1, 1) + 0.2
    config = make_settings(kind, bits, grain)
    codes, codebook = quantize(weight, config)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert int(codes.max()) < 2**bits
    decoded = dequantize(codes, codebook, config)
    assert decoded.dtype == torch.float32

    values, results = weight.double().flatten().numpy(), decoded.double().flatten().numpy()
    for positions in groups_of(weight, grain):
        group, result = values[positions], results[positions]
        step = min_max_step(group, kind, bits)
        levels = step * multiples_of_step(group, kind, bits)
        to_a_level = abs(result[:, None] - levels).min(axis=1)
        assert to_a_level.max() <= 1e-6 * abs(levels).max()
        nearest = abs(group[:, None] - levels).min(axis=1)
        assert (abs(group - result) - nearest).max() <= 1e-4 * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grain", ["tensor", "channel", 4, 7, 18, 100])
def test_codebook_like_names_what_quantize_returns(kind, grain):
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    config = make_settings(kind, 3, grain)
    codebook = quantize(weight, config)[1]
    made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in codebook.items()}
    assert made == codebook_like(weight.shape, config)
    assert len(codebook["scale"]) == len(groups_of(weight, grain))


def test_groups_are_counted_whole_ones_first_then_the_ragged_ends():
    weight = torch.tensor([[1.0, -1, 2, 2, 3], [4, 0, 0, 5, -6]])
    codebook = quantize(weight, CodecSettings(bits=2, grain=2))[1]
    assert codebook["scale"].tolist() == [1, 2, 4, 5, 3, 6]


@pytest.mark.parametrize("grain", ["tensor", "channel", 3])
def test_two_bits_restricted_are_minus_one_zero_one_times_the_largest(grain):
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    decoded = round_trip(weight, CodecSettings(bits=2, grain=grain))
    flat, result = weight.flatten(), decoded.flatten()
    for positions in groups_of(weight, grain):
        largest = flat[positions].abs().max().item()
        assert set(result[positions].tolist()) <= {-largest, 0.0, largest}
        assert largest in result[positions].abs().tolist()


def test_restricted_codes_never_use_the_unpaired_lowest_code():
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    for bits in ALL_BITS:
        for span in ("min_max", "mse"):
            codes = quantize(weight, CodecSettings(bits=bits, range=span))[0]
            assert int(codes.min()) >= 1
            assert int(codes.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("span", ["min_max", "mse"])
@pytest.mark.parametrize("kind", ["restricted", "affine"])
def test_weights_on_the_grid_come_back_exactly(kind, span, bits):
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    lowest, highest = (1 - half, half - 1) if kind == "restricted" else (-1, 2 * half - 2)
    units = rng.integers(lowest, highest, size=(6, 40), endpoint=True)
    units[:, 0], units[:, 1] = lowest, highest
    weight = torch.tensor(units * 2.0 ** rng.integers(-20, 20, size=(6, 1)), dtype=torch.float32)
    assert torch.equal(round_trip(weight, make_settings(kind, bits, range=span)), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("span", ["min_max", "mse"])
def test_groups_of_zeros_decode_to_zeros(kind, bits, span):
    weight = torch.ones(3, 7)
    weight[1] = 0
    weight[2, 4:] = 0
    for grain, zeros in (("channel", (1, slice(None))), (4, (2, slice(4, None)))):
        decoded = round_trip(weight, make_settings(kind, bits, grain, range=span))
        assert not decoded[zeros].any()
    assert not round_trip(torch.zeros(3, 7), make_settings(kind, bits, "tensor", range=span)).any()


@pytest.mark.parametrize("kind", ["restricted", "full", "affine"])
@pytest.mark.parametrize("span", ["min_max", "mse"])
def test_groups_of_zeros_have_the_code_of_zero(kind, span):
    weight = torch.tensor([[1.0, -1, 1], [0, 0, 0]])
    for bits in ALL_BITS:
        codes, codebook = quantize(weight, make_settings(kind, bits, range=span))
        zero = codebook["zero"][1].item() if kind == "affine" else 2 ** (bits - 1)
        assert codes[1].tolist() == [zero] * 3
        assert codebook["scale"][1] == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(0, 2**31), st.floats(-3, 3), st.sampled_from(["min_max", "mse"]))
def test_affine_represents_zero_exactly(bits, seed, shift, span):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 12, generator=generator) + shift
    weight[:, 5] = 0
    decoded = round_trip(weight, make_settings("affine", bits, range=span))
    assert not decoded[:, 5].any()


@pytest.mark.parametrize("sign", [-1, 1])
def test_affine_spends_all_levels_on_a_weight_of_one_sign(sign):
    weight = sign * torch.arange(16.0)[None]
    config = make_settings("affine", 4)
    codes, codebook = quantize(weight, config)
    assert codebook["zero"].tolist() == [0 if sign > 0 else 15]
    assert sorted(codes.flatten().tolist()) == list(range(16))
    assert torch.equal(dequantize(codes, codebook, config), weight)


def brute_force_error(group, kind, bits, candidates=4000):
    units = multiples_of_step(group, kind, bits)
    borders = (units[:-1] + units[1:]) / 2
    full = min_max_step(group, kind, bits)
    errors = []
    for step in full * np.arange(1, candidates + 1) / candidates:
        decoded = step * units[np.searchsorted(borders, group / step)]
        errors.append(np.square(group - decoded).sum())
    return min(errors)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_mse_range_is_within_two_thousandths_of_a_brute_force_search(data, kind, bits):
    weight = sample(data, 1000, seed=3)
    error = squared_error(weight, round_trip(weight, make_settings(kind, bits, range="mse")))
    assert error <= 1.002 * brute_force_error(weight[0].double().numpy(), kind, bits)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_mse_range_never_loses_to_min_max_in_any_group(data, kind, bits):
    weight = sample(data, 30 * 29, seed=4).reshape(30, 29)
    for grain in ("channel", 8):
        by_mse = round_trip(weight, make_settings(kind, bits, grain, range="mse")).flatten()
        by_min_max = round_trip(weight, make_settings(kind, bits, grain, range="min_max")).flatten()
        flat = weight.flatten()
        for positions in groups_of(weight, grain):
            least = squared_error(flat[positions], by_min_max[positions])
            assert squared_error(flat[positions], by_mse[positions]) <= least * (1 + 1e-6)


def test_the_mse_range_gives_up_an_outlier_for_the_bulk():
    weight = sample("one outlier", 10_000)
    errors = [
        squared_error(weight, round_trip(weight, CodecSettings(bits=2, range=span))) for span in ("min_max", "mse")
    ]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", ["min_max", "mse"])
@pytest.mark.parametrize("exponent", [-30, -3, 1, 30])
def test_scaling_the_weight_by_a_power_of_two_scales_only_the_scale(kind, span, exponent):
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(5))
    factor = 2.0**exponent
    for bits in (2, 4, 8):
        config = make_settings(kind, bits, 16, range=span)
        codes, codebook = quantize(weight, config)
        scaled_codes, scaled_codebook = quantize(weight * factor, config)
        assert torch.equal(scaled_codes, codes)
        assert torch.equal(scaled_codebook["scale"], codebook["scale"] * factor)
        if kind == "affine":
            assert torch.equal(scaled_codebook["zero"], codebook["zero"])


@pytest.mark.parametrize("kind", ["restricted", "full", "midrise"])
def test_flipping_the_sign_flips_symmetric_weights_except_on_the_lopsided_grid(kind):
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(6))
    config = make_settings(kind, 3)
    mirrored = torch.equal(round_trip(-weight, config), -round_trip(weight, config))
    assert mirrored == (kind != "full")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", ["min_max", "mse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_arithmetic_runs_in_float32_for_any_dtype(kind, span, dtype):
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(7)).to(dtype)
    config = make_settings(kind, 4, range=span)
    codes, codebook = quantize(weight, config)
    same_codes, same_codebook = quantize(weight.float(), config)
    assert torch.equal(codes, same_codes)
    assert all(torch.equal(codebook[name], same_codebook[name]) for name in codebook)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", ["min_max", "mse"])
def test_weights_whose_squares_overflow_stay_finite(kind, span):
    largest = 2.0**125
    weight = torch.tensor([[largest, -largest, 0, largest / 4]])
    decoded = round_trip(weight, make_settings(kind, 4, range=span))
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).abs().max() <= 0.15 * largest


@pytest.mark.parametrize("grain", ["tensor", "channel", 1, 6])
def test_one_bit_is_the_sign_times_half_a_scale(grain):
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(8))
    for span in ("min_max", "mse"):
        config = CodecSettings("uniform", 1, grain, grid="midrise", range=span)
        codes, codebook = quantize(weight, config)
        assert torch.equal(codes, (weight > 0).to(torch.uint8))
        flat, result = weight.flatten(), dequantize(codes, codebook, config).flatten()
        for positions, scale in zip(groups_of(weight, grain), codebook["scale"], strict=True):
            group = flat[positions]
            expected = group.abs().max() if span == "min_max" else 2 * group.abs().mean()
            torch.testing.assert_close(scale, expected)
            assert torch.equal(result[positions], group.sign() * scale / 2)


def test_one_bit_of_least_squared_error_may_leave_the_range():
    weight = torch.tensor([[1.0, -1, 1, 1]])
    assert torch.equal(round_trip(weight, CodecSettings("uniform", 1, grid="midrise", range="mse")), weight)


def test_one_bit_of_zeros_is_zeros():
    assert not round_trip(torch.zeros(2, 3), CodecSettings("uniform", 1, grid="midrise")).any()
