"""Kernels over tiles, run by Triton's interpreter, against obvious loops in float64."""

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_r2.tiles import Recorded, Tiles

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

SHAPES = [
    pytest.param([(1, 9000), (1, 4096), (1, 5)], id="single groups"),
    pytest.param([(70, 7), (3, 64), (5, 300), (1, 1)], id="short groups"),
    pytest.param([(3, 5000), (2, 1500), (40, 16), (2, 4097)], id="groups of all widths"),
]
every_shape = pytest.mark.parametrize("shapes", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def seeded(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def groups_of(blocks):
    return [row.double() for block in blocks for row in block]


def column(values):
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])


@every_dtype
@every_shape
def test_largest_and_the_signs_of_those_that_are_wanted(shapes, dtype):
    blocks = seeded(shapes, dtype)
    blocks[0].view(-1)[-1] = -blocks[0].abs().max()  # a tie, with another sign, far from the first
    tiles, targets = Tiles(blocks), [torch.ones_like(block) for block in blocks]
    tops, counts, of_tiles = tiles.largest()
    rows = groups_of(blocks)
    assert torch.equal(tops.double(), column(row.abs().max() for row in rows))
    assert torch.equal(counts.double(), column((row.abs() == row.abs().max()).sum() for row in rows))
    wanted = tops.where(torch.arange(len(rows)) % 3 > 0, torch.inf)
    shares = torch.arange(len(rows)) + 1.0
    tiles.add_largest(targets, of_tiles, wanted, shares)
    for group, (row, target) in enumerate(zip(rows, groups_of(targets), strict=True)):
        expected = torch.where(row.abs() == wanted[group], row.sign() * (group + 1), 0) + 1
        assert torch.equal(target, expected)


@every_dtype
@every_shape
def test_ends_and_squares(shapes, dtype):
    blocks = seeded(shapes, dtype)
    high, low, squares = Tiles(blocks).ends_and_squares()
    rows = groups_of(blocks)
    assert torch.equal(high, column(row.max() for row in rows))
    assert torch.equal(low, column(-row.min() for row in rows))
    torch.testing.assert_close(squares, column(row.square().sum() for row in rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_of_weights_that_leave_float32(size):
    (block,) = seeded([(2, 5000)])
    squares = Tiles([block * size]).ends_and_squares()[2]
    torch.testing.assert_close(squares, (block * size).double().square().sum(dim=1), rtol=1e-6, atol=0)


@every_dtype
@every_shape
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0, 2.0])
def test_what_stands_outside_a_level(shapes, dtype, share):
    blocks = seeded(shapes, dtype)
    tiles, targets = Tiles(blocks), [torch.zeros_like(block) for block in blocks]
    rows = groups_of(blocks)
    level = column(share * row.abs().max() for row in rows).float()
    (sums, counts), outside = tiles.excess(level)
    above = [(row.abs() - limit.double()).clamp_min(0) for row, limit in zip(rows, level, strict=True)]
    torch.testing.assert_close(sums, column(each.sum() for each in above), rtol=1e-5, atol=1e-6)
    assert torch.equal(counts, column((each > 0).sum() for each in above))
    tiles.add_signs_outside(targets, outside, level, torch.full_like(level, 0.5))
    for row, each, target in zip(rows, above, groups_of(targets), strict=True):
        assert torch.equal(target, torch.where(each > 0, row.sign() / 2, 0))


@every_shape
def test_the_magnitude_of_a_rank_and_how_many_reach_it(shapes):
    blocks = seeded(shapes)
    blocks[0][0, : min(4, blocks[0].shape[1])] = 0.25
    blocks[-1].zero_()
    tiles, rows = Tiles(blocks), groups_of(blocks)
    fractions = (0.01, 1e-9, 0.3, 1.0)
    ranks = column(max(1, math.ceil(fractions[index % 4] * len(row))) for index, row in enumerate(rows))
    level, reached = tiles.level_of(ranks)
    expected = column(row.abs().sort(descending=True).values[int(k) - 1] for row, k in zip(rows, ranks, strict=True))
    assert torch.equal(level.double(), expected)
    assert torch.equal(reached, column((row.abs() >= at).sum() for row, at in zip(rows, expected, strict=True)))


def solution(row, amount):
    """Solve for the level above which an amount stands out, on sorted magnitudes."""
    sums = row.abs().sort(descending=True).values.cumsum(0)
    return ((sums - amount) / torch.arange(1, len(row) + 1)).amax().clamp_min(0)


AMOUNTS = [0.3, 20.0, 1e-4, 0.0, 1e6]
KINDS = {
    "normal": seeded,
    "ties": lambda shapes: [block.clamp(-1, 1) for block in seeded(shapes)],
    "rounded": lambda shapes: [block.round() for block in seeded(shapes)],
    "zeros": lambda shapes: [block * 0 for block in seeded(shapes)],
    "heavy": lambda shapes: [block**5 for block in seeded(shapes)],
    # By many steps of prox, and moved a little since
    "flattened": lambda shapes: [block.clamp(-1, 1) + 1e-3 * (1e4 * block).sin() for block in seeded(shapes)],
}


@every_shape
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_level_above_which_an_amount_stands_out(shapes, first, kind):
    blocks = KINDS[kind](shapes)
    tiles = Tiles(blocks)
    amounts = column(AMOUNTS[(first + group) % len(AMOUNTS)] for group in range(tiles.groups))
    level, tops = tiles.level_above(amounts)
    expected = column(map(solution, groups_of(blocks), amounts))
    torch.testing.assert_close(level.double(), expected, rtol=2e-6, atol=1e-6)
    limited = [
        torch.maximum(torch.minimum(row.float(), at), -at) for row, at in zip(groups_of(blocks), level, strict=True)
    ]
    tiles.clamp(level, tops=tops)
    for row, target in zip(limited, groups_of(blocks), strict=True):
        assert torch.equal(row.double(), target)


def test_a_level_goes_a_share_of_the_way():
    (block,) = seeded([(3, 5000)])
    start, level, shares = block.clone(), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.25, 0.0])
    Tiles([block]).clamp(level, shares)
    limited = start.clamp(-level[:, None], level[:, None])
    assert torch.equal(block[0], limited[0]) and torch.equal(block[2], start[2])
    torch.testing.assert_close(block[1], start[1].lerp(limited[1], 0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    blocks = seeded([(1, 9000), (3, 20)])
    blocks[0][0, 8000] = blocks[1][1, 3] = bad
    tiles = Tiles(blocks)
    broken = torch.tensor([True, False, True, False])
    amounts = torch.ones(4, dtype=torch.float64)
    for found in (tiles.largest()[0], tiles.ends_and_squares()[2], tiles.excess(torch.ones(4))[0][0]):
        assert torch.equal(~found.isfinite(), broken)
    assert torch.equal(~tiles.level_above(amounts)[0].isfinite(), broken)


def test_targets_may_lie_elsewhere_every_time():
    blocks = seeded([(1, 5000), (4, 16)])
    tiles = Tiles(blocks)
    tops, _, of_tiles = tiles.largest()
    for _ in range(3):
        targets = [torch.zeros_like(block) for block in blocks]
        tiles.add_largest(targets, of_tiles, tops, torch.ones(5))
        assert [target.count_nonzero(dim=1).min().item() for target in targets] == [1, 1]


def test_totals_of_neighbouring_groups():
    tiles = Tiles(seeded([(1, 3)]))
    totals = tiles.totals(torch.arange(3000.0), torch.tensor([0, 2500, 2500, 3000]))
    assert totals.tolist() == [2500 * 2499 / 2, 0, (2500 + 2999) * 250]


def test_work_takes_a_number_or_one_each():
    taken = []
    work = Recorded(lambda values: taken.append(values.tolist()), 2, torch.device("cpu"))
    for value in (0.5, 0.5, torch.tensor([1.0, 2.0]), torch.tensor(3.0), 0.5):
        work(value)
    assert taken == [[0.5, 0.5], [0.5, 0.5], [1, 2], [3, 3], [0.5, 0.5]]
