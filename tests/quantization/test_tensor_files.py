"""Safetensors files tensor by tensor: the bytes of the library that everybody reads with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_r2.quantization.tensor_files import DTYPE_WORDS, DTYPES, TensorWriter, checkpoint_files, stored_tensors

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(st.text('abcé."', min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes))


def filled(layout):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 2, shape, generator=generator).to(DTYPES[word]) for name, (word, shape) in layout.items()
    }


@given(layouts)
def test_a_written_file_has_the_bytes_of_safetensors_and_reads_back(tmp_path_factory, layout):
    directory = tmp_path_factory.mktemp("files")
    tensors = filled(layout)
    save_file(tensors, directory / "theirs.safetensors", metadata={"format": "pt"})
    with TensorWriter(directory / "ours.safetensors", layout) as writer:
        for name in sorted(tensors, reverse=True):
            writer.write(name, tensors[name])
    assert (directory / "ours.safetensors").read_bytes() == (directory / "theirs.safetensors").read_bytes()
    stored = stored_tensors(directory / "ours.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert (read.dtype, read.shape, stored[name].shape) == (tensor.dtype, tensor.shape, tuple(tensor.shape))
        assert torch.equal(read, tensor)
    with TensorWriter(directory / "copy.safetensors", layout) as writer:
        for name in tensors:
            writer.copy(name, stored[name])
    assert (directory / "copy.safetensors").read_bytes() == (directory / "theirs.safetensors").read_bytes()


def test_every_dtype_has_one_word():
    assert len(DTYPE_WORDS) == len(DTYPES)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    layout = {"a": ("F32", (3,)), "b": ("F32", (2,))}
    with pytest.raises(RuntimeError), TensorWriter(tmp_path / "file", layout) as writer:
        writer.write("a", torch.ones(3))
        assert not (tmp_path / "file").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    (stored,) = stored_tensors(path).values()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends too early"):
        stored.read()
    with pytest.raises(ValueError, match="ends too early"):
        list(stored.chunks())


def test_a_dtype_without_a_place_in_torch_is_named_and_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, dtype=torch.float8_e4m3fn)}, path)
    (stored,) = stored_tensors(path).values()
    with pytest.raises(ValueError, match="dtype F8_E4M3"):
        stored.read()


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        checkpoint_files(str(tmp_path))


def test_an_index_names_the_files(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        save_file({name: torch.ones(1)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}'
    )
    assert [file.name for file in checkpoint_files(str(tmp_path))] == ["a.safetensors", "b.safetensors"]
    assert load_file(tmp_path / "a.safetensors").keys() == {"a.safetensors"}
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no a\.safetensors"):
        checkpoint_files(str(tmp_path))
