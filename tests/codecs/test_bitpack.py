import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import bitpack
from hf_r2.codecs.bitpack import pack, packed_size, unpack

ALL_BITS = range(1, 9)
CHUNK = 32


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(bitpack, "_CHUNK", CHUNK)


def reference_bytes(codes, bits):
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


def random_codes(count, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0, 1], 1, [0b00000001, 0b00000001]),
        ([1, 2, 3], 2, [0b00111001]),
        ([7, 0, 7], 3, [0b11000111, 0b1]),
        ([0xA, 0xB, 0xC], 4, [0xBA, 0x0C]),
        ([255, 0, 128], 8, [255, 0, 128]),
    ],
)
def test_streams_written_by_hand(codes, bits, expected):
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_pack_agrees_with_a_big_integer_and_unpack_inverts_it(small_chunks, bits, count):
    codes = random_codes(count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(count, bits),)
    assert packed.tolist() == reference_bytes(codes.tolist(), bits)
    unpacked = unpack(packed, bits, count)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 8).flatmap(
        lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=3 * CHUNK + 1))
    ),
    st.sampled_from([8, 16, CHUNK, 1 << 20]),
)
def test_pack_agrees_with_a_big_integer_for_any_codes_and_chunk(case, chunk):
    bits, codes = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitpack, "_CHUNK", chunk)
        packed = pack(tensor, bits)
        assert packed.tolist() == reference_bytes(codes, bits)
        assert torch.equal(unpack(packed, bits, len(codes)), tensor)


def test_the_real_chunk_is_a_multiple_of_eight():
    assert bitpack._CHUNK % 8 == 0


@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_survive_the_border_of_a_real_chunk(bits):
    count = bitpack._CHUNK + 3
    codes = random_codes(count, bits)
    packed = pack(codes, bits)
    tail = (bitpack._CHUNK - 8) * bits // 8
    assert packed[tail:].tolist() == reference_bytes(codes[bitpack._CHUNK - 8 :].tolist(), bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", range(1, 10))
def test_unused_bits_of_the_last_byte_are_zero(bits, count):
    packed = pack(torch.full((count,), 2**bits - 1, dtype=torch.uint8), bits)
    used = (count * bits - 1) % 8 + 1
    assert packed[-1].item() == 2**used - 1


def test_codes_of_any_shape_and_stride_are_packed_in_row_major_order():
    codes = random_codes(35, 3).reshape(5, 7)
    assert pack(codes, 3).tolist() == reference_bytes(codes.flatten().tolist(), 3)
    assert pack(codes.T, 3).tolist() == reference_bytes(codes.T.flatten().tolist(), 3)


@pytest.mark.parametrize(
    ("count", "bits", "expected"), [(0, 5, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (3, 3, 2), (5, 8, 5)]
)
def test_packed_size_rounds_up_to_whole_bytes(count, bits, expected):
    assert packed_size(count, bits) == expected


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_stream_of_another_length_is_refused_with_both_sizes(extra):
    packed = torch.zeros(packed_size(20, 3) + extra, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"20 codes of 3 bits are 8 bytes .*\({8 + extra},\)"):
        unpack(packed, 3, 20)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.int64, torch.bool])
def test_a_stream_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"uint8.*" + str(dtype)):
        unpack(torch.zeros(8, dtype=dtype), 3, 20)


def test_a_stream_that_is_not_flat_is_refused():
    with pytest.raises(ValueError, match="8 bytes"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 3, 20)
