"""Error-compensated rounding, against its definition step by step."""

import pytest
import torch
from refine_models import build, images
from torch import nn

from hf_r2.codecs import CODECS, CodecSettings, decode, encode
from hf_r2.codecs.bitpack import unpack
from hf_r2.refine import compensate
from hf_r2.refine import compensation as module
from hf_r2.refine.compensation import (
    compensated_codes,
    group_indices,
    round_compensated,
    second_moments,
)
from hf_r2.refine.matrices import matrices
from hf_r2.selection import output_first, select_weights

SETTINGS = {
    "restricted": CodecSettings(bits=2),
    "tensor": CodecSettings(bits=3, grain="tensor"),
    "affine": CodecSettings(bits=3, symmetric=False, grain=5),
    "midrise": CodecSettings(bits=2, grid="midrise"),
    "full": CodecSettings(bits=3, grid="full", grain=7),
    "mse": CodecSettings(bits=2, range="mse"),
    "palette": CodecSettings("palette", 2),
    "palette_groups": CodecSettings("palette", 1, grain=6),
    "one_bit": CodecSettings("least_squares", 1),
    "two_bits": CodecSettings("least_squares", 2, grain=8),
    "three_bits": CodecSettings("least_squares", 3),
    "ternary": CodecSettings("least_squares", 2, basis="ternary"),
}


def correlated(n, rows=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    common = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mixing / n**0.5 + common


def weight_of(out=6, n=20, seed=1):
    return torch.randn(out, n, generator=torch.Generator().manual_seed(seed))


def output_error(inputs, weight, other):
    return (inputs @ (weight.double() - other.double()).T).square().sum(dim=0)


def reference_codes(weight, hessian, tables, owners):
    """One input after another, with the inverse of what is left of H computed anew for each."""
    left, n = weight.double().clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for j in range(n):
        inverse = torch.linalg.inv(damped[j:, j:])
        for row in range(len(weight)):
            table = tables[owners[row, j]].double()
            code = (table - left[row, j]).abs().argmin().item()
            codes[row, j] = code
            error = left[row, j] - table[code]
            left[row, j:] -= error / inverse[0, 0] * inverse[:, 0]
    return codes


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("name", SETTINGS)
def test_codes_are_those_of_the_definition(name, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    settings, weight, inputs = SETTINGS[name], weight_of(), correlated(20)
    encoded = encode(weight, settings)
    tables = CODECS[settings.method].levels(encoded.codebook, settings)
    owners = group_indices(encoded)
    hessian = inputs.T @ inputs
    codes = compensated_codes(weight.double()[None], hessian[None], tables, owners[None])[0]
    expected = reference_codes(weight, hessian, tables, owners)
    values = tables.gather(1, codes.long()) if len(tables) == len(weight) else None
    if values is None:
        values, wanted = (tables[owners, each.long()] for each in (codes, expected))
    else:
        wanted = tables.gather(1, expected.long())
    torch.testing.assert_close(values, wanted)


@pytest.mark.parametrize("name", SETTINGS)
def test_levels_are_what_the_codes_decode_to(name):
    settings, weight = SETTINGS[name], weight_of()
    encoded = encode(weight, settings)
    tables = CODECS[settings.method].levels(encoded.codebook, settings)
    codes = unpack(encoded.codes, encoded.bits, encoded.code_count).view(weight.shape)
    assert torch.equal(tables[group_indices(encoded), codes.long()], decode(encoded))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_never_worse_than_by_nearest_rounding(name, seed):
    weight, inputs = weight_of(seed=seed), correlated(20, seed=seed)
    plain = encode(weight, SETTINGS[name])
    compensated = round_compensated(weight, plain, (inputs.T @ inputs)[None])
    before, after = (output_error(inputs, weight, decode(each)) for each in (plain, compensated))
    assert (after <= before * (1 + 1e-9)).all()
    assert compensated.settings == plain.settings
    assert all(torch.equal(compensated.codebook[key], plain.codebook[key]) for key in plain.codebook)


@pytest.mark.parametrize("settings", [CodecSettings(bits=3), CodecSettings("palette", 3)], ids=lambda s: s.method)
def test_correlated_inputs_make_a_difference(settings):
    weight, inputs = weight_of(16, 64), correlated(64)
    plain = encode(weight, settings)
    compensated = round_compensated(weight, plain, (inputs.T @ inputs)[None])
    before, after = (output_error(inputs, weight, decode(each)).sum() for each in (plain, compensated))
    assert after < 0.85 * before


def test_uncorrelated_inputs_leave_nearest_rounding():
    weight = weight_of()
    plain = encode(weight, CodecSettings(bits=3))
    assert torch.equal(
        round_compensated(weight, plain, 5 * torch.eye(20, dtype=torch.float64)[None]).codes, plain.codes
    )


def test_inputs_that_are_always_zero_do_no_harm():
    weight, inputs = weight_of(), correlated(20)
    inputs[:, 3:6] = 0
    plain = encode(weight, CodecSettings(bits=2))
    compensated = decode(round_compensated(weight, plain, (inputs.T @ inputs)[None]))
    assert torch.equal(compensated[:, 3:6], decode(plain)[:, 3:6])
    assert torch.isfinite(compensated).all()


def test_groups_of_channels_are_rounded_each_by_its_own_inputs():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2, padding=1).requires_grad_(False)
    inputs = torch.randn(3, 4, 6, 6)
    hessian = second_moments(layer, inputs, 3 * 36)
    both = round_compensated(layer.weight, encode(layer.weight, CodecSettings(bits=2)), hessian)
    for index, part in enumerate(layer.weight.split(3)):
        alone = round_compensated(part, encode(part, CodecSettings(bits=2)), hessian[index : index + 1])
        assert torch.equal(decode(both)[3 * index : 3 * index + 3], decode(alone))


def test_second_moments_are_of_the_windows(monkeypatch):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 2, (2, 3), padding=1, stride=2)
    inputs = torch.randn(2, 3, 7, 6)
    windows = nn.functional.unfold(inputs, (2, 3), padding=1, stride=2).double().movedim(1, 2).flatten(0, 1)
    for piece in (1 << 24, 18 * 5):
        monkeypatch.setattr(module, "_PIECE", piece)
        torch.testing.assert_close(second_moments(layer, inputs, len(windows))[0], windows.T @ windows)


def test_a_model_is_rounded_layer_by_layer_behind_rounded_layers():
    model, batches = build("resnet"), images()
    selection = select_weights(model)
    weights = {name: layer.weight.clone() for name, (layer, _) in selection.items()}
    settings = CodecSettings(bits=3)
    encoded = compensate(model, selection, settings, batches)
    assert encoded.keys() == weights.keys()
    for name, (layer, _) in selection.items():
        assert torch.equal(output_first(layer, layer.weight), decode(encoded[name]))
    # The last layer's inputs come from all layers that were rounded before
    layer, seen = selection["classifier.1.weight"][0], []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    inputs = torch.cat(seen)
    weight = weights["classifier.1.weight"]
    expected = round_compensated(weight, encode(weight, settings), (inputs.T @ inputs)[None])
    assert torch.equal(expected.codes, encoded["classifier.1.weight"].codes)
    assert matrices(layer, weight).shape == (1, 3, 16)


def test_palettes_of_vectors_are_refused():
    model = build("resnet")
    settings = CodecSettings("palette", 4, cluster_dim=2)
    with pytest.raises(ValueError, match="set cluster_dim=1 for 'resnet"):
        compensate(model, select_weights(model), settings, images())


def test_empty_calibration_data_is_refused():
    model = build("resnet")
    with pytest.raises(ValueError, match="the calibration data is empty"):
        compensate(model, select_weights(model), CodecSettings(), [])
