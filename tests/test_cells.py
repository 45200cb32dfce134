"""Searching a block by cells against obvious loops, and what is searched that way against a pass over the whole."""

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_r2 import RangeProjection
from hf_r2.cells import CELL, cell_peaks, cell_size, crowded, excess, pick_cells, sample_cells
from hf_r2.losses import RangeLoss
from hf_r2.projection import prox_l_inf

USERS = [import_module(name) for name in ("hf_r2.losses.l_inf", "hf_r2.losses.margin", "hf_r2.projection")]
SHAPES = st.tuples(
    st.integers(1, 5), st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 257, 262, 384, 390]))
)


@st.composite
def searches(draw):
    """A block, with ties, and a level for each of its groups."""
    groups, n = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    block = torch.randn(groups, n, generator=generator)
    if draw(st.booleans()):
        block = (2 * block).round() / 2
    level = block.abs().amax(dim=1) * draw(st.sampled_from([0.0, 0.3, 0.8, 0.99, 1.0, 1.5]))
    return block, level


def loop_excess(block, level):
    above = [
        [abs(value) - limit for value in row if abs(value) > limit] for row, limit in zip(block, level, strict=True)
    ]
    return np.array([[sum(row) for row in above], [len(row) for row in above]], dtype=np.float64)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(search=searches())
def test_peaks_are_the_largest_magnitudes_of_cells_of_one_size_near_the_usual(search):
    block, _ = search
    peaks = cell_peaks(block)
    n = block.shape[1]
    size = n // peaks.shape[1]
    divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
    largest, next_larger = max(d for d in divisors if d <= CELL), min([d for d in divisors if d > CELL], default=n)
    assert size == (largest if 8 * largest >= min(n, CELL) else next_larger)
    for row, found in zip(block.tolist(), peaks.tolist(), strict=True):
        assert found == [max(map(abs, row[start : start + size])) for start in range(0, n, size)]


def test_peaks_of_nothing_are_zero():
    assert cell_peaks(torch.empty(3, 0)).tolist() == [[0], [0], [0]]
    assert cell_peaks(torch.empty(0, 5)).shape[0] == 0


@pytest.mark.parametrize("above", [False, True])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(search=searches())
def test_cells_at_or_above_the_level_are_picked_unless_they_are_many(above, search):
    block, level = search
    peaks = cell_peaks(block)
    size = block.shape[1] // peaks.shape[1]
    wanted = [
        (row * peaks.shape[1] + cell, row)
        for row, cells in enumerate(peaks.tolist())
        for cell, peak in enumerate(cells)
        if (peak > level[row] if above else peak == level[row])
    ]
    picked = pick_cells(block, peaks, level, above)
    if 4 * len(wanted) > peaks.numel():
        assert picked is None
        return
    assert list(zip(picked.index.tolist(), picked.groups.tolist(), strict=True)) == wanted
    assert picked.size == size
    expected = [block[row, (cell % peaks.shape[1]) * size :][:size].tolist() for cell, row in wanted]
    assert picked.of(block).reshape(len(wanted), size).tolist() == expected


def test_nothing_is_picked_from_an_empty_block():
    assert pick_cells(torch.empty(0, 5), torch.empty(0, 1), torch.empty(0)) is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(search=searches())
def test_excess_agrees_with_a_loop_over_the_picked_cells_and_over_all(search):
    block, level = search
    expected = loop_excess(block.tolist(), level.tolist())
    for picked in (None, pick_cells(block, cell_peaks(block), level, above=True)):
        found = excess(block, level, picked)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found[0].numpy(), expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[1].numpy(), expected[1])


def test_excess_of_a_block_larger_than_a_piece_counts_every_element():
    block = torch.randn(3, 500_000, generator=torch.Generator().manual_seed(0))
    found = excess(block, torch.tensor([0.0, 0.5, 3.0]), None)
    magnitudes = block.double().abs() - torch.tensor([0.0, 0.5, 3.0])[:, None]
    torch.testing.assert_close(found[0], magnitudes.relu().sum(1), rtol=1e-6, atol=0)
    assert found[1].tolist() == (magnitudes > 0).sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_of_one_group_larger_than_a_piece_counts_every_element(dtype):
    block = torch.randn(1, 200_001, generator=torch.Generator().manual_seed(0), dtype=dtype)
    above = (block.double().abs() - 0.5).relu()
    sums, counts = excess(block, torch.tensor([0.5], dtype=dtype), None)
    torch.testing.assert_close(sums, above.sum(1), rtol=1e-6, atol=0)
    assert counts.tolist() == [(above > 0).sum()]


def test_excess_of_what_is_not_a_number_is_none():
    block = torch.ones(1, 100_000)
    block[0, 70_000] = float("nan")
    assert excess(block, torch.zeros(1), None)[0].isnan()


def test_excess_of_an_empty_group_is_nothing():
    assert excess(torch.empty(1, 0), torch.zeros(1), None).tolist() == [[0], [0]]


@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_a_sample_has_cells_from_all_over(count):
    cells = sample_cells(torch.arange(1000.0).repeat_interleave(128)[None], count).view(-1, 128)
    assert min(count, 500) <= len(cells) <= max(2 * count, 1000)
    assert (cells == cells[:, :1]).all()
    gaps = cells[:, 0].diff()
    assert cells[0, 0] == 0 and (gaps == gaps[:1]).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (0.001, False), (0.02, True), (0.5, True)])
def test_crowded_tells_whether_most_cells_hold_an_element_above(share, expected):
    block = torch.rand(1, 400_000, generator=torch.Generator().manual_seed(0))
    assert crowded(-block, torch.tensor([1 - share])) is expected


def test_small_blocks_and_several_groups_are_never_crowded():
    assert not crowded(torch.ones(1, 1 << 13), torch.zeros(1))
    assert not crowded(torch.ones(2, 1 << 15), torch.zeros(2))


def seeded(shape, seed=0):
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_cells(patch):
    for user in USERS:
        patch.setattr(user, "pick_cells", lambda *arguments, **options: None)


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
    """Notes whether cells were picked, by the modules that pick."""
    found = []

    def noted(*arguments, **options):
        found.append(pick_cells(*arguments, **options))
        return found[-1]

    for user in USERS:
        monkeypatch.setattr(user, "pick_cells", noted)
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
    assert any(found is not None for found in picks)
    without_cells(monkeypatch)
    torch.testing.assert_close(by_cells, measured(weight, kind, grain, share, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("grain", ["tensor", "channel", 2048])
def test_prox_is_the_same_by_cells_and_by_the_whole(monkeypatch, picks, grain, t):
    weight = seeded((24, 4096))
    by_cells = prox_l_inf(weight, t, grain)
    assert t > 1e-3 or any(found is not None for found in picks)
    without_cells(monkeypatch)
    torch.testing.assert_close(by_cells, prox_l_inf(weight, t, grain), rtol=1e-6, atol=0)


def test_prox_that_starts_at_the_last_limits_ends_where_a_fresh_one_does():
    model = nn.Sequential(nn.Linear(400, 300))
    projection = RangeProjection(model, "prox")
    for step in range(8):
        with torch.no_grad():
            model[0].weight.add_(0.1 * seeded((300, 400), seed=step))
        fresh = prox_l_inf(model[0].weight, 8.0)
        projection.step(8.0)
        torch.testing.assert_close(model[0].weight.detach(), fresh, rtol=1e-6, atol=0)


@pytest.mark.parametrize("move", [1e-2, 1e-4, 1e-6])
def test_prox_of_a_large_flattened_weight_that_starts_at_a_sample_shaves_off_t(move):
    """Many elements tie at the limit, and what stands out may be small beside it."""
    flat = seeded((800, 900)).double().clamp(-0.03, 0.03)
    model = nn.Sequential(nn.Linear(900, 800, dtype=torch.float64))
    model[0].weight = nn.Parameter(flat)
    projection = RangeProjection(model, "prox")
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
    picked = pick_cells(block, cell_peaks(block), block.abs().amax(dim=1))
    assert picked.of(block).shape[1] == cell_size(512)
    block.untyped_storage().resize_(0)  # as FSDP2 frees a weight that it has gathered


@pytest.mark.parametrize("t", [5.0, 0.5, 0.05])
def test_prox_that_starts_at_the_last_limits_stays_right_while_training_settles(t):
    """The moves, and what is shaved off, shrink step by step, as with a learning rate that falls to zero."""
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
