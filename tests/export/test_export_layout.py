"""The blocks that exporters write are the weight."""

import torch
from export_models import CODECS
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.export.layout import Grid, blocks_of


def values(block):
    """Decode a block by the definitions of its classes: `(groups, elements of a group)`."""
    if isinstance(block, Grid):
        return (block.codes.float() - block.offset) * block.scale
    entries = [
        table[codes.long()].flatten()[: block.size] for table, codes in zip(block.entries, block.codes, strict=True)
    ]
    return torch.stack(entries)


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    grain=st.sampled_from(["tensor", "channel", 1, 2, 3, 7, 200]),
    seed=st.integers(0, 9),
)
def test_blocks_side_by_side_are_the_weight(codec, shape, grain, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    encoded = encode(weight, CodecSettings(**CODECS[codec], grain=grain))
    rows = [values(block).reshape(shape[0], -1) for block in blocks_of(encoded)]
    assert torch.equal(torch.cat(rows, dim=1).reshape(shape), decode(encoded))
