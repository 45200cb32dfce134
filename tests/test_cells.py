"""Searching a block by cells against obvious loops, and what is searched that way against a pass over the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_r2 import RangeProjection, cells
from hf_r2.cells import CELL, Cells, Picked, cell_size, crowded, excess, excess_of_one, sample_magnitudes
from hf_r2.largest import Found, InChunks
from hf_r2.losses import RangeLoss
from hf_r2.projection import prox_l_inf

SHAPES = st.tuples(
    st.integers(1, 5), st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 257, 262, 384, 390]))
)


@st.composite
def searches(draw):
    """Blocks, with ties, and a level for each of their groups."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    blocks = [torch.randn(shape, generator=generator) for shape in draw(st.lists(SHAPES, min_size=1, max_size=4))]
    if draw(st.booleans()):
        blocks = [(2 * block).round() / 2 for block in blocks]
    shares = st.sampled_from([0.0, 0.3, 0.8, 0.99, 1.0, 1.5])
    return blocks, torch.cat([block.abs().amax(dim=1) * draw(shares) for block in blocks])


def rows_of(blocks):
    return [row for block in blocks for row in block.tolist()]


def loop_excess(rows, level):
    pairs = zip(rows, level, strict=True)
    above = [[abs(value) - limit for value in row if abs(value) > limit] for row, limit in pairs]
    return np.array([[sum(row), len(row)] for row in above], dtype=np.float64)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(search=searches())
def test_peaks_are_the_largest_magnitudes_of_cells_of_one_size_near_the_usual(search):
    blocks, _ = search
    searched = Cells(blocks)
    for block, peaks in zip(blocks, searched.split_peaks(), strict=True):
        n = block.shape[1]
        size = n // peaks.shape[1]
        divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
        largest, next_larger = max(d for d in divisors if d <= CELL), min([d for d in divisors if d > CELL], default=n)
        assert size == (largest if 8 * largest >= min(n, CELL) else next_larger)
        for row, found in zip(block.tolist(), peaks.tolist(), strict=True):
            assert found == [max(map(abs, row[start : start + size])) for start in range(0, n, size)]
    assert searched.tops().tolist() == [max(map(abs, row)) for row in rows_of(blocks)]


def test_peaks_are_the_same_in_blocks_larger_than_what_is_cached(monkeypatch):
    block = torch.randn(3, 1280, generator=torch.Generator().manual_seed(0))
    expected = block.abs().view(-1, 128).amax(dim=1)
    for cached in (1, 300, 1280, 1 << 18):
        monkeypatch.setattr(cells, "CACHED", cached)
        assert torch.equal(Cells([block]).peaks, expected)


def held(picked, blocks):
    """Whole blocks, and positions and values of the elements in the picked cells, by block."""
    found = {b: [] for b in range(len(blocks)) if b not in picked.whole}
    for batch in picked.cells:
        copies = iter(batch.of(blocks))
        for b, index in batch.index.items():
            found[b] += [(cell * batch.size, next(copies).tolist()) for cell in index.tolist()]
    return found


@pytest.mark.parametrize("cached", [1, 128, 300])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(search=searches())
def test_cells_above_a_level_are_found_without_a_look_at_those_of_most_chunks(cached, search):
    blocks, level = search
    expected = Cells(blocks).pick(level, above=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CACHED", cached)
        found = Cells(blocks, level=level).pick(level, above=True)
    assert held(found, blocks) == held(expected, blocks)


@pytest.mark.parametrize("place", [0, 700, 1279])
def test_what_is_not_a_number_is_found_in_any_chunk(monkeypatch, place):
    monkeypatch.setattr(cells, "CACHED", 256)
    block = torch.ones(1, 1280)
    block[0, place] = torch.nan
    searched = Cells([block], level=torch.tensor([2.0]))
    assert searched.tops().isnan().all()


def test_chunks_without_a_cell_asked_for_are_read_once(monkeypatch):
    monkeypatch.setattr(cells, "CACHED", 256)
    looked_at = []
    monkeypatch.setattr(torch, "amax", lambda chunk, **_: looked_at.append(chunk.data_ptr()))
    monkeypatch.setattr(torch, "amin", lambda chunk, **_: looked_at.append(chunk.data_ptr()))
    block = torch.arange(1280.0)[None]
    Cells([block], level=torch.tensor([1300.0]))
    assert looked_at == []
    Cells([block], level=torch.tensor([1279.0 - 1]))
    assert set(looked_at) == {block[:, 1024:].data_ptr()}


def test_peaks_of_nothing_are_zero():
    assert Cells([torch.empty(3, 0)]).tops().tolist() == [0, 0, 0]
    assert Cells([torch.empty(0, 5)]).tops().tolist() == []


def test_crowded_blocks_are_picked_as_a_whole_unread():
    blocks = [torch.full((1, 1 << 14), torch.nan), torch.ones(2, 256)]
    picked = Cells(blocks, [True, False]).pick(torch.tensor([0.5, 2.0, 2.0]), above=True)
    assert picked == Picked([], [0])


@pytest.mark.parametrize("above", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(search=searches())
def test_cells_at_or_above_the_level_are_picked_unless_they_are_many(above, search):
    blocks, level = search
    picked = Cells(blocks).pick(level, above)
    found = {b: [] for b in range(len(blocks)) if b not in picked.whole}
    for batch in picked.cells:
        copies, groups = iter(batch.of(blocks)), iter(batch.groups.tolist())
        for b, index in batch.index.items():
            assert batch.size == cell_size(blocks[b].shape[1])
            found[b] += [(cell, next(groups), next(copies).tolist()) for cell in index.tolist()]
    first = 0
    for b, block in enumerate(blocks):
        size = cell_size(block.shape[1])
        rows = block.view(-1, size).tolist()
        of_group = block.shape[1] // size
        wanted = [(cell, first + cell // of_group, row) for cell, row in enumerate(rows)]
        wanted = [
            each
            for each in wanted
            if (max(map(abs, each[2])) > level[each[1]] if above else max(map(abs, each[2])) == level[each[1]])
        ]
        assert (b in picked.whole) == (4 * len(wanted) > len(rows))
        assert found.get(b, wanted) == wanted
        first += len(block)


def test_nothing_is_picked_from_an_empty_block():
    assert Cells([torch.empty(0, 5)]).pick(torch.empty(0)).cells == []
    assert Cells([torch.empty(2, 0)]).pick(torch.zeros(2)).cells == []


@pytest.mark.parametrize(("piece", "batches"), [(1 << 17, [[0, 1, 3], [4]]), (300, [[0, 1], [3], [4]]), (1, None)])
def test_cells_of_one_size_are_copied_together_as_long_as_they_are_few(monkeypatch, piece, batches):
    monkeypatch.setattr(cells, "CPU_PIECE", piece)
    blocks = [torch.arange(1280.0).view(1, -1).roll(b) for b in range(5)]
    blocks[4] = torch.arange(1000.0).view(1, -1)
    level = torch.tensor([1279.0, 1279, 2000, 1279, 999])
    picked = Cells(blocks).pick(level)
    assert [list(batch.index) for batch in picked.cells] == (batches or [[0], [1], [3], [4]])
    assert [batch.groups.tolist() for batch in picked.cells] == (batches or [[0], [1], [3], [4]])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(search=searches())
def test_excess_agrees_with_a_loop_over_the_picked_cells_and_over_all(search):
    blocks, level = search
    expected = loop_excess(rows_of(blocks), level.tolist())
    searched = Cells(blocks)
    for picked in (Picked([], list(range(len(blocks)))), searched.pick(level, above=True)):
        found = searched.excess(level, picked)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found[:, 0].numpy(), expected[:, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[:, 1].numpy(), expected[:, 1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(search=searches())
def test_magnitudes_above_the_level_are_those_in_the_cells(search):
    blocks, level = search
    picked = Cells(blocks).pick(level, above=True)
    magnitudes, groups = picked.above(blocks, level)
    skipped = [b in picked.whole for b, block in enumerate(blocks) for _ in block]
    expected = [
        (group, abs(value))
        for group, row in enumerate(rows_of(blocks))
        for value in row
        if not skipped[group] and abs(value) > level[group]
    ]
    assert sorted(zip(groups.tolist(), magnitudes.tolist(), strict=True)) == sorted(expected)


def test_excess_of_a_block_larger_than_a_piece_counts_every_element():
    block = torch.randn(3, 500_000, generator=torch.Generator().manual_seed(0))
    found = excess(block, torch.tensor([0.0, 0.5, 3.0]))
    magnitudes = block.double().abs() - torch.tensor([0.0, 0.5, 3.0])[:, None]
    torch.testing.assert_close(found[:, 0], magnitudes.relu().sum(1), rtol=1e-6, atol=0)
    assert found[:, 1].tolist() == (magnitudes > 0).sum(1).tolist()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("elements", [1, 97, 200_001, 3 * 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_of_one_group_counts_every_element(dtype, elements, compiled):
    block = torch.randn(1, elements, generator=torch.Generator().manual_seed(0), dtype=dtype)
    above = (block.double().abs() - 0.5).relu()
    total, count = excess_of_one(block, 0.5, compiled)
    assert total == pytest.approx(above.sum().item(), rel=1e-6)
    assert count == (above > 0).sum()
    assert compiled or excess(block, torch.tensor([0.5], dtype=dtype)).tolist() == [[total, count]]


@pytest.mark.parametrize("compiled", [False, True])
def test_excess_of_what_is_not_a_number_is_none(compiled):
    block = torch.ones(1, 100_000)
    block[0, 70_000] = float("nan")
    assert math.isnan(excess_of_one(block, 0.0, compiled)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_excess_of_an_empty_group_is_nothing(compiled):
    assert excess_of_one(torch.empty(1, 0), 0.0, compiled) == (0, 0)


@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_a_sample_has_cells_from_all_over(count):
    sample = sample_magnitudes(-torch.arange(1000.0).repeat_interleave(128)[None], count).reshape(-1, 128)
    assert min(count, 500) <= len(sample) <= max(2 * count, 1000)
    assert (sample == sample[:, :1]).all()
    gaps = np.diff(sample[:, 0])
    assert sample[0, 0] == 0 and (gaps == gaps[:1]).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (0.001, False), (0.02, True), (0.5, True)])
def test_crowded_tells_whether_most_cells_hold_an_element_above(share, expected):
    block = torch.rand(1, 400_000, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([1 - share])
    assert crowded([-block], level) == [expected]
    assert crowded([torch.ones(3, 4), -block, block], torch.cat([torch.zeros(3), level, level])) == [
        False,
        expected,
        expected,
    ]


def test_small_blocks_and_several_groups_are_never_crowded():
    assert crowded([torch.ones(1, 1 << 11), torch.ones(2, 1 << 15)], torch.zeros(3)) == [False, False]


def seeded(shape, seed=0):
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_cells(patch):
    patch.setattr(Cells, "pick", lambda self, level, above=False: Picked([], list(range(len(self.blocks)))))
    patch.setattr(InChunks, "find", lambda self, level: Found(self._blocks, level, [], list(range(len(level)))))


def measured(weight, kind, grain, share, **options):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight = nn.Parameter(weight.clone())
    loss = RangeLoss(model, kind, grain, **options)
    with torch.no_grad():
        for level in loss.parameters():
            level.mul_(share)
    value = loss.measure()
    loss.accumulate_grad_()
    return [value, model[0].weight.grad, *(level.grad for level in loss.parameters())]


@pytest.fixture
def picks(monkeypatch):
    """Notes what was picked."""
    found = []

    def noting(method):
        def noted(*arguments, **options):
            found.append(method(*arguments, **options))
            return found[-1]

        return noted

    monkeypatch.setattr(Cells, "pick", noting(Cells.pick))
    monkeypatch.setattr(InChunks, "find", noting(InChunks.find))
    return found


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("grain", ["tensor", "channel", 2048])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("l_inf", {}), ("margin", {"margin_reduction": "max"}), ("margin", {"margin_reduction": "sum"})],
    ids=["l_inf", "margin_max", "margin_sum"],
)
def test_losses_are_the_same_by_cells_and_by_the_whole(monkeypatch, picks, kind, options, grain, share):
    weight = seeded((24, 4096))
    weight[3, 5] = weight[20, 7] = -weight.abs().max()  # a tie
    by_cells = measured(weight, kind, grain, share, **options)
    assert any(not found.whole for found in picks)
    without_cells(monkeypatch)
    torch.testing.assert_close(by_cells, measured(weight, kind, grain, share, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("grain", ["tensor", "channel", 2048])
def test_prox_is_the_same_by_cells_and_by_the_whole(monkeypatch, picks, grain, t):
    weight = seeded((24, 4096))
    by_cells = prox_l_inf(weight, t, grain)
    assert t > 1e-3 or any(not found.whole for found in picks)
    without_cells(monkeypatch)
    torch.testing.assert_close(by_cells, prox_l_inf(weight, t, grain), rtol=1e-6, atol=0)


def test_prox_that_starts_at_the_last_limits_ends_where_a_fresh_one_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    projection = RangeProjection(model, "prox")
    for step in range(8):
        with torch.no_grad():
            model[0].weight.add_(0.1 * seeded((300, 400), seed=step))
        fresh = prox_l_inf(model[0].weight, 8.0)
        projection.step(8.0)
        torch.testing.assert_close(model[0].weight.detach(), fresh, rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("move", [1e-2, 1e-4, 1e-6])
def test_prox_of_a_large_flattened_weight_shaves_off_t(move, compiled):
    """Many elements tie at the limit, and what stands out may be small beside it."""
    flat = seeded((800, 900)).double().clamp(-0.03, 0.03)
    model = nn.Sequential(nn.Linear(900, 800, dtype=torch.float64))
    model[0].weight = nn.Parameter(flat)
    projection = RangeProjection(model, "prox")
    if compiled:
        projection.compile()
    for step in range(4):
        with torch.no_grad():
            moved = torch.rand((800, 900), generator=torch.Generator().manual_seed(step)) < 0.3
            before = model[0].weight.add_(move * seeded((800, 900), seed=step).double() * moved).clone()
        t = 0.8 * (before.abs() - 0.03).relu().sum().item()
        projection.step(t)
        shaved = (before.abs() - model[0].weight.detach().abs()).sum().item()
        assert shaved == pytest.approx(t, rel=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_prox_tells_of_a_broken_weight_wherever_it_is_broken(broken, place):
    model = nn.Sequential(nn.Linear(1031, 401))
    with torch.no_grad():
        model[0].weight.view(-1)[place] = broken
    with pytest.raises(ValueError, match=r"0\.weight: NaN or infinite"):
        RangeProjection(model, "prox").step(0.01)


def test_storages_stay_resizable():
    block = torch.randn(4, 512)
    searched = Cells([block])
    (batch,) = searched.pick(searched.tops()).cells
    batch.add([block], batch.of([block]))
    block.untyped_storage().resize_(0)  # as FSDP2 frees a weight that it has gathered


@pytest.mark.parametrize("t", [5.0, 0.5, 0.05])
def test_prox_that_starts_at_the_last_limits_stays_right_while_training_settles(t):
    """The moves, and what is shaved off, shrink step by step, as with a learning rate that falls to zero."""
    torch.manual_seed(2)  # with which what ties at the last limit once is all that a step of Newton's method crosses
    model = nn.Sequential(nn.Linear(576, 64))
    projection = RangeProjection(model, "prox")
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        rate = 1 - step / 100
        with torch.no_grad():
            noise = torch.randn((64, 576), generator=generator) * (torch.rand((64, 576), generator=generator) < 0.5)
            before = model[0].weight.add_(1e-3 * rate * noise).clone()
        expected = prox_l_inf(before, t * rate) - before
        projection.step(t * rate)
        assert (model[0].weight.detach() - before - expected).norm() <= 1e-3 * expected.norm()
