import numpy as np
import pytest
import torch

from hf_r2.codecs import CodecSettings
from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.codecs.palette import codebook_like, dequantize, nearest, quantize

ALL_BITS = range(1, 9)
GRAINS = ["tensor", "channel", 1, 4, 7, 18, 100]


def make_weight(shape=(5, 2, 3, 3), seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.2


def groups_of(weight, grain):
    """Positions of each group in the flattened weight: for every span of inputs, all channels."""
    inputs = weight[0].numel()
    if grain == "tensor":
        return [list(range(weight.numel()))]
    size = inputs if grain == "channel" else grain
    whole = [
        [channel * inputs + i for i in range(start, start + size)]
        for channel in range(len(weight))
        for start in range(0, inputs - size + 1, size)
    ]
    rest = [
        [channel * inputs + i for i in range(inputs - inputs % size, inputs)]
        for channel in range(len(weight))
        if inputs % size
    ]
    return whole + rest


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("grain", GRAINS)
def test_codes_name_the_nearest_entry_of_their_groups_table(bits, grain):
    weight = make_weight(seed=bits)
    config = CodecSettings("palette", bits, grain)
    codes, codebook = quantize(weight, config)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert int(codes.max()) < 2**bits
    decoded = dequantize(codes, codebook, config)
    assert decoded.dtype == torch.float32
    assert decoded.shape == weight.shape

    values, results = weight.double().flatten().numpy(), decoded.double().flatten().numpy()
    flat_codes = codes.flatten().numpy()
    groups = groups_of(weight, grain)
    tables = codebook["lut"].double().numpy()
    assert tables.shape == (len(groups), 2**bits)
    for positions, table in zip(groups, tables, strict=True):
        assert (table[flat_codes[positions]] == results[positions]).all()
        distances = abs(values[positions][:, None] - table)
        slack = np.spacing(np.float32(abs(table).max()))
        assert (abs(values[positions] - results[positions]) <= distances.min(axis=1) + slack).all()


@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
@pytest.mark.parametrize("bits", [1, 3])
def test_tables_are_the_optimal_clusters_of_their_group(bits, grain):
    weight = make_weight()
    tables = quantize(weight, CodecSettings("palette", bits, grain))[1]["lut"]
    for positions, table in zip(groups_of(weight, grain), tables, strict=True):
        assert torch.equal(table, kmeans_1d(weight.flatten()[positions][None], 2**bits)[0])


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("shape", [(5, 18), (4, 1, 3, 3), (3, 2, 2, 2, 2), (1, 5)])
def test_codebook_like_names_what_quantize_returns(grain, shape):
    weight = make_weight(shape)
    config = CodecSettings("palette", 2, grain)
    lut = quantize(weight, config)[1]["lut"]
    assert codebook_like(shape, config) == {"lut": (tuple(lut.shape), lut.dtype)}


@pytest.mark.parametrize("grain", ["channel", 4, 7])
def test_a_group_with_no_more_values_than_the_table_comes_back_exactly(grain):
    levels = torch.tensor([-0.7, 0.0, 0.1, 3.0])
    weight = levels[torch.randint(0, 4, (6, 19), generator=torch.Generator().manual_seed(0))]
    for bits in (2, 5):
        config = CodecSettings("palette", bits, grain)
        assert torch.equal(dequantize(*quantize(weight, config), config), weight)


def test_groups_of_zeros_decode_to_zeros():
    weight = torch.ones(3, 7)
    weight[1] = 0
    config = CodecSettings("palette", 3)
    assert torch.equal(dequantize(*quantize(weight, config), config), weight)
    config = CodecSettings("palette", 3, "tensor")
    assert not dequantize(*quantize(torch.zeros(3, 7), config), config).any()


def test_an_element_halfway_between_two_entries_takes_the_smaller():
    block = torch.tensor([[-1.0, -0.5, 0.5, 1.5, 9.0]])
    assert nearest(block, torch.tensor([[-1.0, 0.0, 1.0, 2.0]])).tolist() == [[0, 0, 1, 2, 3]]


def test_entries_near_the_largest_float32_do_not_overflow():
    table = torch.tensor([[1e38, 2e38, 3e38, 3.3e38]])
    assert nearest(torch.tensor([[1e38, 1.6e38, 2.9e38, 3.4e38]]), table).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_are_float32_for_any_dtype(dtype):
    weight = make_weight().to(dtype)
    codes, codebook = quantize(weight, CodecSettings("palette", 3))
    same_codes, same_codebook = quantize(weight.float(), CodecSettings("palette", 3))
    assert codebook["lut"].dtype == torch.float32
    assert torch.equal(codebook["lut"], same_codebook["lut"])
    assert torch.equal(codes, same_codes)


def test_more_bits_never_cost_accuracy():
    weight = make_weight((8, 100))
    errors = []
    for bits in ALL_BITS:
        config = CodecSettings("palette", bits)
        errors.append((dequantize(*quantize(weight, config), config) - weight).double().square().sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
