import numpy as np
import pytest
import torch
from test_palette import groups_of, make_weight

from hf_r2.codecs import CodecSettings, decode, encode, mse
from hf_r2.codecs.binary_bases import solve
from hf_r2.codecs.least_squares import assign, code_count, codebook_like, dequantize, quantize

GRAINS = ["tensor", "channel", 1, 4, 7, 18, 100]
KINDS = [("optimal", 1), ("optimal", 2), ("optimal", 3), ("optimal", 8), ("greedy", 4), ("ternary", 2)]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("basis", "bits"), KINDS)
def test_every_element_is_a_signed_sum_of_its_groups_scales(basis, bits, grain):
    weight = make_weight(seed=bits)
    config = CodecSettings("least_squares", bits, grain, basis=basis)
    codes, codebook = quantize(weight, config)
    assert (codes.dtype, codes.shape) == (torch.uint8, weight.shape)
    assert int(codes.max()) < 2**bits
    decoded = dequantize(codes, codebook, config)
    assert (decoded.dtype, decoded.shape) == (torch.float32, weight.shape)
    groups = groups_of(weight, grain)
    assert codebook["basis"].shape == (len(groups), bits)
    for positions, scales in zip(groups, codebook["basis"].numpy(), strict=True):
        for code, value in zip(codes.flatten()[positions].tolist(), decoded.flatten()[positions], strict=True):
            level = np.float32(0)
            for index, scale in enumerate(scales):
                level = np.float32(level + (scale if code >> index & 1 else -scale))
            assert level == value


@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
@pytest.mark.parametrize(("basis", "bits"), KINDS)
def test_scales_are_those_of_their_group(basis, bits, grain):
    weight = make_weight()
    found = quantize(weight, CodecSettings("least_squares", bits, grain, basis=basis))[1]["basis"]
    for positions, scales in zip(groups_of(weight, grain), found, strict=True):
        alone = solve(weight.flatten()[positions][None], bits, basis)[0]
        torch.testing.assert_close(scales, alone, rtol=1e-5, atol=1e-6 * weight.abs().max().item())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
def test_codes_of_an_optimal_basis_name_the_nearest_level(grain, bits):
    weight = make_weight(seed=bits)
    config = CodecSettings("least_squares", bits, grain)
    codes, codebook = quantize(weight, config)
    decoded = dequantize(codes, codebook, config)
    signs = 2 * ((np.arange(2**bits)[:, None] >> np.arange(bits)) & 1) - 1
    for positions, scales in zip(groups_of(weight, grain), codebook["basis"].double().numpy(), strict=True):
        values, results = (tensor.flatten()[positions].double().numpy() for tensor in (weight, decoded))
        distances = abs(values[:, None] - signs @ scales)
        assert (abs(values - results) <= distances.min(axis=1) + 1e-6 * scales.sum()).all()


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("shape", [(5, 18), (4, 1, 3, 3), (3, 2, 2, 2, 2), (1, 5)])
def test_codebook_like_names_what_quantize_returns(grain, shape):
    config = CodecSettings("least_squares", 3, grain)
    codes, codebook = quantize(make_weight(shape), config)
    basis = codebook["basis"]
    assert codebook_like(shape, config) == {"basis": (tuple(basis.shape), basis.dtype)}
    assert code_count(shape, config) == codes.numel()


def test_ternary_has_three_levels_one_of_them_zero():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for row in decode(encode(weight, CodecSettings("least_squares", 2, basis="ternary"))):
        low, zero, high = row.unique().tolist()
        assert (low, zero) == (-high, 0)


@pytest.mark.parametrize(("basis", "bits"), KINDS)
def test_groups_of_zeros_and_of_one_magnitude_come_back(basis, bits):
    weight = make_weight((3, 14))
    weight[1] = 0
    weight[2] = torch.tensor([0.3, -0.3] * 7)
    decoded = decode(encode(weight, CodecSettings("least_squares", bits, basis=basis)))
    assert not decoded[1].any()
    torch.testing.assert_close(decoded[2], weight[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("basis", "bits"), KINDS)
def test_assign_follows_no_gradient_and_repeats_what_quantize_does(basis, bits):
    weight, config = make_weight().requires_grad_(), CodecSettings("least_squares", bits, 7, basis=basis)
    codes, codebook = quantize(weight.detach(), config)
    assert torch.equal(assign(weight, codebook["basis"].requires_grad_(), config), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_float32_for_any_dtype(dtype):
    weight, config = make_weight().to(dtype), CodecSettings("least_squares", 3)
    (codes, codebook), (same_codes, same_codebook) = quantize(weight, config), quantize(weight.float(), config)
    assert torch.equal(codebook["basis"], same_codebook["basis"])
    assert torch.equal(codes, same_codes)


@pytest.mark.parametrize(("basis", "bits"), [("optimal", 1), ("optimal", 2), ("ternary", 2)])
def test_encoding_a_decoded_weight_again_changes_nothing_but_the_last_digits(basis, bits):
    config = CodecSettings("least_squares", bits, basis=basis)
    decoded = decode(encode(make_weight((30, 147)) ** 3, config))
    again = decode(encode(decoded, config))
    torch.testing.assert_close(again, decoded, rtol=1e-5, atol=1e-6 * decoded.abs().max().item())


def test_more_scales_never_cost_accuracy():
    weight = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    errors = [mse(weight, decode(encode(weight, CodecSettings("least_squares", bits)))) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    # A palette may put its levels where it likes: for a group of two bits they are free, here they come in pairs ±
    assert errors[1] >= mse(weight, decode(encode(weight, CodecSettings("palette", 2))))
    assert errors[1] <= 1.1 * mse(weight, decode(encode(weight, CodecSettings("palette", 2))))
