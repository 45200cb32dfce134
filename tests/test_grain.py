import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.grain import blocks, group_counts, join, parse_grain

GRAINS = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 40))
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def numbered(shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(*shape).to(dtype)


@pytest.mark.parametrize(
    ("given_grain", "normal"), [("tensor", "tensor"), ("channel", "channel"), (64, 64), ("64", 64)]
)
def test_parse_grain_returns_the_normal_form(given_grain, normal):
    assert parse_grain(given_grain) == normal


@pytest.mark.parametrize("grain", ["chanel", "", "-3", "0", 0, -1, 2.0, True, None])
def test_parse_grain_rejects_anything_else_and_names_the_choices(grain):
    with pytest.raises(ValueError, match="use 'tensor', 'channel' or a positive group size"):
        parse_grain(grain)


@pytest.mark.parametrize("grain", ["chanel", 0, -3, 2.5])
def test_blocks_rejects_an_unknown_grain_and_names_the_choices(grain):
    with pytest.raises(ValueError, match="use 'tensor', 'channel' or a positive group size"):
        blocks(torch.ones(2, 10), grain)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("grain", ["tensor", "channel", 2])
def test_blocks_of_an_empty_weight_raise(shape, grain):
    with pytest.raises(ValueError, match="exclude it from the selection"):
        blocks(torch.empty(shape), grain)


@pytest.mark.parametrize("grain", ["channel", 4])
def test_blocks_of_a_vector_need_grain_tensor(grain):
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(8,\)"):
        blocks(torch.ones(8), grain)


@pytest.mark.parametrize(
    ("grain", "expected"),
    [
        ("tensor", [[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]]),
        ("channel", [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]),
        (1, [[[0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]]),
        (2, [[[0, 1], [2, 3], [5, 6], [7, 8]], [[4], [9]]]),
        (3, [[[0, 1, 2], [5, 6, 7]], [[3, 4], [8, 9]]]),
        (5, [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]),
        (99, [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]),
    ],
)
def test_blocks_hold_the_groups_of_each_grain(grain, expected):
    assert [block.tolist() for block in blocks(numbered((2, 5)), grain)] == expected


def test_inputs_of_a_channel_are_its_flattened_dimensions():
    flat, kernel = blocks(numbered((2, 12)), 5), blocks(numbered((2, 3, 2, 2)), 5)
    assert [block.tolist() for block in flat] == [block.tolist() for block in kernel]


@settings(max_examples=150, deadline=None)
@given(SHAPES, GRAINS)
def test_join_is_the_inverse_of_blocks(shape, grain):
    weight = numbered(shape)
    assert torch.equal(join(blocks(weight, grain), weight.shape, grain), weight)


@settings(max_examples=150, deadline=None)
@given(SHAPES, GRAINS)
def test_group_counts_count_the_groups_of_blocks(shape, grain):
    assert group_counts(shape, grain) == [len(block) for block in blocks(numbered(shape), grain)]


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 40))
def test_no_group_is_larger_than_its_grain_or_crosses_a_channel(shape, grain):
    channel = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    for block in blocks(channel, grain):
        assert block.shape[1] <= grain
        assert torch.equal(block.amin(dim=1), block.amax(dim=1))


@pytest.mark.parametrize("grain", ["tensor", "channel", 5])
def test_blocks_of_a_transposed_weight_round_trip(grain):
    weight = numbered((6, 4)).T
    assert torch.equal(join(blocks(weight, grain), weight.shape, grain), weight)


@pytest.mark.parametrize("shape", [(), (7,)])
def test_small_weights_round_trip_as_one_tensor(shape):
    weight = torch.ones(shape)
    assert torch.equal(join(blocks(weight, "tensor"), weight.shape, "tensor"), weight)


@pytest.mark.parametrize(
    ("dtype", "raised"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint8, torch.float32),
        (torch.int8, torch.float32),
        (torch.int64, torch.float32),
    ],
)
@pytest.mark.parametrize("grain", ["tensor", "channel", 2])
def test_blocks_are_float32_or_better(dtype, raised, grain):
    assert {block.dtype for block in blocks(numbered((2, 5), dtype), grain)} == {raised}


def test_integer_codes_keep_their_values():
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(join(blocks(codes, 24), codes.shape, 24).to(torch.uint8), codes)


@pytest.mark.parametrize("grain", ["tensor", "channel", 3])
def test_join_keeps_the_dtype_of_its_parts(grain):
    codes = [block.to(torch.uint8) for block in blocks(numbered((2, 8)), grain)]
    assert join(codes, (2, 8), grain).dtype == torch.uint8


@pytest.mark.parametrize("grain", ["tensor", "channel", 3])
def test_gradient_passes_through_blocks_and_join(grain):
    weight = numbered((2, 8)).requires_grad_()
    join([2 * block for block in blocks(weight, grain)], weight.shape, grain).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 8), 2.0))
