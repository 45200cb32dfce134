"""The search for the largest elements of groups against obvious loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2 import cells
from hf_r2.largest import InCells, InChunks, search_largest

SINGLE = st.lists(st.integers(1, 700), min_size=1, max_size=4).map(lambda sizes: [(1, size) for size in sizes])
SEVERAL = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 300)), min_size=1, max_size=4)


@st.composite
def searches(draw):
    """Blocks, some with many ties or zeros alone, and for each group whether its largest elements are wanted."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    blocks = [torch.randn(shape, generator=generator) for shape in draw(st.one_of(SINGLE, SEVERAL))]
    step = draw(st.sampled_from([None, 1.0, 4.0, 100.0]))
    if step:
        blocks = [(block / step).round() * step for block in blocks]
    groups = sum(len(block) for block in blocks)
    return blocks, torch.tensor(draw(st.lists(st.booleans(), min_size=groups, max_size=groups)))


def loop(blocks, level):
    """Signs of the elements whose magnitude is the level of their group, zeros elsewhere."""
    levels = level.split([len(block) for block in blocks])
    return [
        torch.where(block.abs() == top[:, None], block.sign(), 0) for block, top in zip(blocks, levels, strict=True)
    ]


@pytest.mark.parametrize("cached", [1, 128, 1 << 18])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(search=searches())
def test_the_largest_elements_are_found_with_their_signs_once_each(cached, search):
    blocks, wanted = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CACHED", cached)
        searched = search_largest(blocks)
    assert isinstance(searched, InChunks if all(len(block) == 1 for block in blocks) else InCells)
    tops = searched.tops()
    assert tops.tolist() == [row.abs().max().item() for block in blocks for row in block]
    level = tops.where(wanted, torch.inf)
    _, _, elements, whole = searched.find(level)
    found = [torch.zeros_like(block) for block in blocks]
    for picked, signs in elements:
        assert not set(picked.index) & set(whole)
        assert picked.groups.tolist() == sorted(picked.groups)
        picked.add(found, signs[:, None])
    for b, expected in enumerate(loop(blocks, level)):
        if b in whole:
            assert expected.count_nonzero() > 1 or (blocks[b] == 0).all() or blocks[b].numel() < 4 * cells.CELL
        else:
            assert torch.equal(found[b], expected)


@pytest.mark.parametrize("place", [0, 700, 1279])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_any_chunk(monkeypatch, place, bad):
    monkeypatch.setattr(cells, "CACHED", 256)
    block = torch.ones(1, 1280)
    block[0, place] = bad
    (top,) = search_largest([block, torch.ones(1, 3)]).tops()[:1].tolist()
    assert math.isnan(top) if math.isnan(bad) else top == math.inf


@pytest.mark.parametrize("bad", [3.0, math.nan, -math.inf])
def test_several_threads_find_the_same(monkeypatch, bad):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    block = torch.linspace(-2, 1, 1000)[None].contiguous()
    block[0, 500] = bad
    top = search_largest([block]).tops().item()
    assert math.isnan(top) if math.isnan(bad) else top == abs(bad)


def test_blocks_without_elements_have_no_largest():
    searched = search_largest([torch.zeros(1, 0), torch.tensor([[1.0, -2.0]])])
    assert searched.tops().tolist() == [0, 2]
    _, _, ((picked, signs),), whole = searched.find(searched.tops())
    assert picked.index[1].tolist() == [1]
    assert (signs.tolist(), whole) == ([-1], [])


def test_a_block_of_many_ties_is_left_whole():
    searched = search_largest([torch.ones(1, 1 << 14), torch.arange(300.0)[None]])
    _, _, elements, whole = searched.find(searched.tops())
    assert whole == [0]
    assert np.array_equal(elements[0][0].groups, [1])


def test_one_chunk_alone_is_looked_at_again(monkeypatch):
    monkeypatch.setattr(cells, "CACHED", 256)
    searched = search_largest([torch.arange(1280.0)[None]])
    looked_at, find = [], np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda mask: looked_at.append(mask.size) or find(mask))
    searched.find(searched.tops())
    assert looked_at == [256]
    searched.find(torch.tensor([math.inf]))
    assert looked_at == [256]
