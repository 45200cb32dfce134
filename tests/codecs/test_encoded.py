import numpy as np
import pytest
import torch
from torch import nn

from hf_r2.codecs import CODECS, METHODS, CodecSettings, decode, encode, mse, sqnr
from hf_r2.codecs.bitpack import packed_size
from hf_r2.codecs.encoded import bands

SHAPES = {
    "linear": nn.Linear(20, 6).weight.shape,
    "convolution": nn.Conv2d(4, 6, 3).weight.shape,
    "grouped convolution": nn.Conv2d(8, 6, 3, groups=2).weight.shape,
    "depthwise convolution": nn.Conv2d(6, 6, 5, groups=6).weight.shape,
    "pointwise convolution": nn.Conv2d(7, 3, 1).weight.shape,
    "convolution 1d": nn.Conv1d(3, 5, 4).weight.shape,
    "convolution 3d": nn.Conv3d(2, 4, (1, 2, 3)).weight.shape,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SETTINGS = [
    CodecSettings("uniform", 2),
    CodecSettings("uniform", 4, 8),
    CodecSettings("uniform", 3, "tensor", grid="full"),
    CodecSettings("uniform", 5, "channel", grid="midrise", range="mse"),
    CodecSettings("uniform", 8, 7, symmetric=False),
    CodecSettings("palette", 1),
    CodecSettings("palette", 3, 7),
    CodecSettings("palette", 6, "tensor"),
    CodecSettings("palette", 1, "channel", cluster_dim=2),
    CodecSettings("palette", 3, 7, cluster_dim=3),
    CodecSettings("palette", 4, "tensor", cluster_dim=4),
    CodecSettings("palette", 8, 5, cluster_dim=64),
    CodecSettings("least_squares", 1, "tensor"),
    CodecSettings("least_squares", 2),
    CodecSettings("least_squares", 4, 7),
    CodecSettings("least_squares", 8, "tensor"),
    CodecSettings("least_squares", 3, "channel", basis="greedy"),
    CodecSettings("least_squares", 2, 5, basis="ternary"),
]


def settings_id(settings):
    return f"{settings.method}-{settings.bits}-{settings.grain}-{settings.cluster_dim or settings.basis}"


def make_weight(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)


@pytest.mark.parametrize("settings", SETTINGS, ids=settings_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_decoded_weight_is_what_the_codec_makes_of_it_in_its_own_dtype(kind, dtype, settings):
    weight = make_weight(SHAPES[kind], dtype)
    encoded = encode(weight, settings)
    codec = CODECS[settings.method]
    expected = codec.dequantize(*codec.quantize(weight, settings), settings, weight.shape).to(dtype)
    decoded = decode(encoded)
    assert decoded.dtype == dtype
    assert decoded.shape == weight.shape
    assert torch.equal(decoded, expected)

    assert (encoded.shape, encoded.dtype) == (weight.shape, dtype)
    assert (encoded.bits, encoded.grain) == (settings.bits, settings.grain)
    assert encoded.codes.dtype == torch.uint8
    assert encoded.code_count == codec.code_count(weight.shape, settings) == codec.quantize(weight, settings)[0].numel()
    assert encoded.codes.shape == (packed_size(encoded.code_count, settings.bits),)
    made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in encoded.codebook.items()}
    assert made == codec.codebook_like(weight.shape, settings)


@pytest.mark.parametrize(
    "settings",
    [
        *(CodecSettings("uniform", bits, grain) for bits in range(2, 9) for grain in ("tensor", "channel", 16)),
        *(CodecSettings("palette", bits, grain) for bits in range(1, 9) for grain in ("tensor", "channel", 16, 50)),
    ],
    ids=settings_id,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoding_a_decoded_weight_again_changes_nothing(settings, dtype):
    weight = make_weight((30, 147), dtype, seed=settings.bits) ** 3
    decoded = decode(encode(weight, settings))
    assert torch.equal(decode(encode(decoded, settings)), decoded)


@pytest.mark.parametrize("grain", ["tensor", "channel", 12])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cluster_dim", [2, 3])
def test_encoding_decoded_vectors_that_fill_their_groups_again_changes_nothing(cluster_dim, bits, grain):
    settings = CodecSettings("palette", bits, grain, cluster_dim=cluster_dim)
    decoded = decode(encode(make_weight((10, 48), seed=bits) ** 3, settings))
    assert torch.equal(decode(encode(decoded, settings)), decoded)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("n", [9, 144, 147])
def test_encoding_a_decoded_sparse_weight_again_changes_nothing(bits, n):
    weight = make_weight((20, n)) * (make_weight((20, n), seed=1) > 0.1)
    settings = CodecSettings("palette", bits)
    decoded = decode(encode(weight, settings))
    assert torch.equal(decode(encode(decoded, settings)), decoded)


@pytest.mark.parametrize(
    ("settings", "shape", "expected"),
    [
        (CodecSettings("uniform", 4, 32), (8, 64), 5),
        (CodecSettings("uniform", 4, 32, symmetric=False), (8, 64), 5.25),
        (CodecSettings("uniform", 2, "channel"), (16, 128), 2 + 32 / 128),
        (CodecSettings("uniform", 8, "tensor"), (10, 10), 8 + 32 / 100),
        (CodecSettings("uniform", 4, 32), (2, 48), (2 * 48 * 4 + 2 * 2 * 32) / 96),
        (CodecSettings("uniform", 3, "tensor"), (3, 5), (6 * 8 + 32) / 15),
        (CodecSettings("palette", 1, "tensor"), (16, 64), 1 + 2 * 32 / 1024),
        (CodecSettings("palette", 4, "channel"), (8, 3, 8, 8), 4 + 16 * 32 / 192),
        (CodecSettings("palette", 2, 64), (8, 128), 2 + 4 * 32 / 64),
        (CodecSettings("palette", 8, "tensor"), (4, 4), 8 + 256 * 32 / 16),
        (CodecSettings("palette", 4, "tensor", cluster_dim=4), (64, 64), 1 + 16 * 4 * 32 / 4096),
        (CodecSettings("palette", 8, "tensor", cluster_dim=8), (64, 64), 1 + 256 * 8 * 32 / 4096),
        (CodecSettings("palette", 2, 64, cluster_dim=2), (8, 128), 1 + 4 * 2 * 32 / 64),
        (CodecSettings("least_squares", 1, "channel"), (16, 128), 1 + 32 / 128),
        (CodecSettings("least_squares", 3, 64), (8, 128), 3 + 3 * 32 / 64),
        (CodecSettings("least_squares", 2, "tensor", basis="ternary"), (32, 32), 2 + 2 * 32 / 1024),
        # 5 codes for the 14 elements of a channel; 4 codes for a run of 10 and 3 for a run of 8, 28 bits in 4 bytes
        (CodecSettings("palette", 4, "channel", cluster_dim=3), (8, 14), (5 * 4 + 16 * 3 * 32) / 14),
        (CodecSettings("palette", 1, 10, cluster_dim=3), (4, 18), (8 * 4 + 8 * 2 * 3 * 32) / 72),
    ],
)
def test_bits_per_weight_count_codes_scales_zero_points_and_tables(settings, shape, expected):
    encoded = encode(make_weight(shape), settings)
    assert encoded.bits_per_weight == pytest.approx(expected, rel=1e-12)
    assert encoded.nbytes * 8 == pytest.approx(expected * encoded.shape.numel())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "settings", [CodecSettings(), CodecSettings("palette"), CodecSettings("least_squares")], ids=METHODS
)
def test_a_weight_that_is_not_finite_is_refused_by_name(settings, bad):
    weight = make_weight((4, 6))
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"weight 'encoder\.0\.weight' has NaN or infinite values"):
        encode(weight, settings, name="encoder.0.weight")
    with pytest.raises(ValueError, match="the weight has NaN or infinite values"):
        encode(weight, settings)


@pytest.mark.parametrize(
    "settings", [CodecSettings(), CodecSettings("palette"), CodecSettings("least_squares")], ids=METHODS
)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_a_weight_without_elements_is_refused(settings, shape):
    with pytest.raises(ValueError, match="no elements; exclude it"):
        encode(torch.empty(shape), settings)


@pytest.mark.parametrize("grain", ["channel", 4])
def test_channels_of_a_vector_are_refused(grain):
    with pytest.raises(ValueError, match="at least two dimensions"):
        encode(torch.ones(6), CodecSettings(grain=grain))


@pytest.mark.parametrize(
    "settings",
    [
        CodecSettings(grain="tensor"),
        CodecSettings("palette", grain="tensor"),
        CodecSettings("palette", grain="tensor", cluster_dim=2),
        CodecSettings("least_squares", grain="tensor"),
    ],
)
def test_a_vector_is_one_tensor_group(settings):
    weight = make_weight((9,))
    assert decode(encode(weight, settings)).shape == weight.shape


def test_encoding_neither_changes_the_weight_nor_follows_its_gradient():
    weight = nn.Parameter(make_weight((6, 20)))
    before = weight.detach().clone()
    encoded = encode(weight, CodecSettings())
    assert torch.equal(weight.detach(), before)
    assert not decode(encoded).requires_grad


@pytest.mark.parametrize(
    "settings",
    [
        CodecSettings("uniform", 3, 5),
        CodecSettings("palette", 3, 5, cluster_dim=2),
        CodecSettings("least_squares", 3, 5),
    ],
)
def test_memory_layout_does_not_matter(settings):
    weight = make_weight((6, 4, 3, 3))
    expected = decode(encode(weight, settings))
    assert torch.equal(decode(encode(weight.to(memory_format=torch.channels_last), settings)), expected)
    assert torch.equal(decode(encode(weight.transpose(0, 1).contiguous().transpose(0, 1), settings)), expected)


def test_settings_are_asked_for_by_name():
    class ByName:
        def settings_for(self, name):
            return CodecSettings("palette", 1) if name == "head.weight" else CodecSettings("uniform", 8)

    weight = make_weight((4, 6))
    assert encode(weight, ByName(), "head.weight").settings == CodecSettings("palette", 1)
    assert encode(weight, ByName(), "body.weight").settings == CodecSettings("uniform", 8)


def test_truncated_codes_are_refused():
    encoded = encode(make_weight((4, 6)), CodecSettings(bits=3))
    encoded.codes = encoded.codes[:-1]
    with pytest.raises(ValueError, match="24 codes of 3 bits are 9 bytes"):
        decode(encoded)
    encoded = encode(make_weight((4, 6)), CodecSettings("palette", 3, cluster_dim=4))
    encoded.codes = encoded.codes[:-1]
    with pytest.raises(ValueError, match="8 codes of 3 bits are 3 bytes"):
        decode(encoded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_agree_with_numpy(dtype):
    weight = make_weight((7, 11), dtype)
    decoded = decode(encode(weight, CodecSettings(bits=3)))
    w, d = weight.double().numpy(), decoded.double().numpy()
    assert mse(weight, decoded) == pytest.approx(np.mean((w - d) ** 2), rel=1e-12)
    assert sqnr(weight, decoded) == pytest.approx(10 * np.log10(np.sum(w**2) / np.sum((w - d) ** 2)), rel=1e-12)


def test_an_exact_copy_has_no_error_and_infinite_sqnr():
    weight = make_weight((3, 4))
    assert mse(weight, weight.clone()) == 0
    assert sqnr(weight, weight.clone()) == float("inf")


def test_tiny_errors_do_not_underflow():
    weight = torch.tensor([1e-30, 2e-30])
    assert mse(weight, torch.zeros(2)) == pytest.approx(2.5e-60, rel=1e-6)
    assert sqnr(weight, torch.tensor([1e-30, 1e-30])) == pytest.approx(10 * np.log10(5), rel=1e-6)


@pytest.mark.parametrize("grain", ["tensor", "channel", 5, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "uniform", "bits": 3, "symmetric": False},
        {"method": "palette", "bits": 3},
        {"method": "palette", "bits": 3, "cluster_dim": 2},
        {"method": "least_squares", "bits": 3},
    ],
    ids=str,
)
def test_bands_of_channels_decode_to_the_whole(settings, grain, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(37, 5, 3)
    compressed = encode(weight, CodecSettings(**settings, grain=grain))
    (whole,) = bands(compressed)
    assert whole is compressed
    expected = decode(compressed)
    monkeypatch.setattr("hf_r2.codecs.encoded._BAND", 200)
    parts = list(bands(compressed))
    follows = grain != 7 and "cluster_dim" not in settings
    assert [part.shape[0] for part in parts] == ([8, 8, 8, 8, 5] if follows else [37])
    assert torch.equal(decode(compressed), expected)
    assert torch.equal(torch.cat([decode(part) for part in parts]), expected)
