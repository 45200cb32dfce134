import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.codecs.kmeans_vectors import kmeans_vectors
from hf_r2.codecs.palette import assign, code_count, codebook_like, dequantize, nearest, quantize, vectors

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
    for cluster_dim in (1, 2, 7):
        config = CodecSettings("palette", 2, grain, cluster_dim=cluster_dim)
        codes, codebook = quantize(weight, config)
        lut = codebook["lut"]
        assert codebook_like(shape, config) == {"lut": (tuple(lut.shape), lut.dtype)}
        assert code_count(shape, config) == codes.numel()


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


# --- tables given by a caller -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_dim", [1, 3])
@pytest.mark.parametrize("grain", GRAINS)
def test_quantize_assigns_to_the_tables_that_it_makes(grain, cluster_dim):
    weight = make_weight()
    config = CodecSettings("palette", 2, grain, cluster_dim=cluster_dim)
    codes, codebook = quantize(weight, config)
    assert torch.equal(assign(weight, codebook["lut"], config), codes)


@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
def test_codes_name_the_nearest_value_of_any_ascending_table(grain):
    weight = make_weight()
    config = CodecSettings("palette", 3, grain)
    groups = groups_of(weight, grain)
    lut = (10 * torch.randn(len(groups), 8, generator=torch.Generator().manual_seed(3))).sort(dim=1).values
    codes = assign(weight, lut, config)
    assert codes.shape == weight.shape
    for positions, table in zip(groups, lut, strict=True):
        distances = (weight.flatten()[positions][:, None] - table).abs()
        assert codes.flatten()[positions].tolist() == distances.argmin(dim=1).tolist()


def test_assigning_follows_no_gradient():
    weight, lut = make_weight((4, 6)).requires_grad_(), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]] * 4).requires_grad_()
    assert not assign(weight, lut, CodecSettings("palette", 1, cluster_dim=2)).requires_grad


# --- vectors ----------------------------------------------------------------------------------------------------------


def vectors_by_hand(values, d):
    """Runs of d; the last one goes on from the beginning of the group."""
    n = len(values)
    return [[values[(start + i) % n] for i in range(d)] for start in range(0, n, d)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 12, 64])
def test_the_last_vector_is_completed_with_the_first_elements_around_and_around(n, d):
    block = torch.arange(2 * n).view(2, n)
    assert vectors(block, d).tolist() == [vectors_by_hand(row, d) for row in block.tolist()]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from(["tensor", "channel", 1, 2, 5, 7, 100]),
    st.integers(1, 8),
    st.sampled_from([2, 3, 4, 8, 64]),
    st.integers(0, 3),
)
def test_codes_of_vectors_follow_the_groups_and_decode_to_the_nearest_entries(shape, grain, bits, d, seed):
    weight = make_weight(tuple(shape), seed)
    config = CodecSettings("palette", bits, grain, cluster_dim=d)
    codes, codebook = quantize(weight, config)
    decoded = dequantize(codes, codebook, config, weight.shape)
    assert (codes.dtype, decoded.dtype, decoded.shape) == (torch.uint8, torch.float32, weight.shape)

    groups = groups_of(weight, grain)
    assert codebook["lut"].shape == (len(groups), 2**bits, d)
    assert codes.shape == (code_count(weight.shape, config),)
    flat, result, rest = weight.flatten().tolist(), decoded.flatten().tolist(), codes.tolist()
    for positions, table in zip(groups, codebook["lut"].tolist(), strict=True):
        for start, vector in enumerate(vectors_by_hand([flat[p] for p in positions], d)):
            code = rest.pop(0)
            distances = [sum((x - c) ** 2 for x, c in zip(vector, entry, strict=True)) for entry in table]
            assert code == distances.index(min(distances))
            own = positions[start * d : (start + 1) * d]
            assert [result[p] for p in own] == table[code][: len(own)]
    assert not rest


@pytest.mark.parametrize("grain", ["tensor", "channel", 4, 7])
@pytest.mark.parametrize("d", [2, 3, 64])
def test_tables_of_vectors_are_the_clusters_of_their_group(d, grain):
    weight = make_weight()
    lut = quantize(weight, CodecSettings("palette", 2, grain, cluster_dim=d))[1]["lut"]
    for positions, table in zip(groups_of(weight, grain), lut, strict=True):
        points = vectors_by_hand(weight.flatten()[positions].tolist(), d)
        assert torch.equal(table, kmeans_vectors(torch.tensor([points]), 4)[0])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("grain", ["tensor", "channel", 8])
def test_groups_of_no_more_distinct_vectors_than_entries_come_back_exactly(grain, bits):
    generator = torch.Generator().manual_seed(bits)
    entries = torch.randn(2**bits, 4, generator=generator)
    weight = entries[torch.randint(2**bits, (6, 8), generator=generator)].flatten(1)
    config = CodecSettings("palette", bits, grain, cluster_dim=4)
    assert torch.equal(dequantize(*quantize(weight, config), config, weight.shape), weight)


@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 1), (1, 5), (2, 7)])
@pytest.mark.parametrize("d", [2, 5, 64])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_weight_of_fewer_elements_than_a_vector_or_of_one_comes_back(shape, d, bits):
    weight = torch.arange(1.0, 1 + int(np.prod(shape))).reshape(shape)
    config = CodecSettings("palette", bits, "tensor", cluster_dim=d)
    if code_count(shape, config) <= 2**bits:
        assert torch.equal(decode(encode(weight, config)), weight)


@pytest.mark.parametrize("value", [0.0, 0.1, -7e5])
def test_a_constant_weight_comes_back_whatever_the_vectors(value):
    weight = torch.full((3, 7), value)
    for bits, grain, d in ((1, "tensor", 2), (8, "channel", 4), (3, 2, 64)):
        config = CodecSettings("palette", bits, grain, cluster_dim=d)
        assert torch.equal(decode(encode(weight, config)), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_vectors_are_float32_for_any_dtype(dtype):
    weight = make_weight().to(dtype)
    config = CodecSettings("palette", 3, cluster_dim=4)
    (codes, codebook), (same_codes, same_codebook) = quantize(weight, config), quantize(weight.float(), config)
    assert codebook["lut"].dtype == torch.float32
    assert torch.equal(codebook["lut"], same_codebook["lut"])
    assert torch.equal(codes, same_codes)


def test_vectors_spend_their_bits_better_than_values():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    error = {}
    for bits, d in ((2, 1), (4, 2), (8, 4)):
        decoded = decode(encode(weight, CodecSettings("palette", bits, "tensor", cluster_dim=d)))
        error[d] = (decoded - weight).square().mean().item()
    assert error[4] < error[2] < error[1]
