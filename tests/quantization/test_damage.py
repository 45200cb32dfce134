"""Damaged and edited checkpoints: refused with a ValueError that says what to do, never loaded."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import assert_same_tensors, load, mixed, state
from safetensors.torch import load_file, save_file

SETTINGS = mixed("resnet")
ADVICE = "download or save it again"
CLASSIFIER = "classifier.1.weight"
FIRST_CONV = "resnet.embedder.embedder.convolution.weight"


@dataclass
class Checkpoint:
    """A private copy of a compressed checkpoint, to be damaged."""

    directory: Path

    @property
    def file(self) -> Path:
        """The weights."""
        return self.directory / "model.safetensors"

    @property
    def header_size(self) -> int:
        """Bytes of the JSON header."""
        return int.from_bytes(self.file.read_bytes()[:8], "little")

    @property
    def data_start(self) -> int:
        """Where the tensors' bytes begin."""
        return 8 + self.header_size

    @property
    def header(self) -> dict[str, Any]:
        """The JSON header."""
        return json.loads(self.file.read_bytes()[8 : self.data_start])

    def write(self, content: bytes) -> None:
        """Replace the weights' file by a new one."""
        self.file.unlink(missing_ok=True)
        self.file.write_bytes(content)

    def write_header(self, header: dict[str, Any]) -> None:
        """Replace the header and its length, and keep the data."""
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.write(len(text).to_bytes(8, "little") + text + self.file.read_bytes()[self.data_start :])

    def edit_tensors(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Write the weights' file anew, sound, with other tensors."""
        tensors = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        edit(tensors)
        self.file.unlink()
        save_file(tensors, self.file, metadata={"format": "pt"})

    def edit_config(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Edit the quantization config in config.json."""
        path = self.directory / "config.json"
        config = json.loads(path.read_text())
        edit(config["quantization_config"])
        path.write_text(json.dumps(config))

    def refused(self, match: str = ADVICE, **kwargs: Any) -> None:
        """Check that loading raises a ValueError with this in its text."""
        with pytest.raises(ValueError, match=match):
            load("resnet", self.directory, **kwargs)


@pytest.fixture(scope="session")
def sound(compressed_checkpoint):
    return compressed_checkpoint("resnet", **SETTINGS)


@pytest.fixture
def checkpoint(sound, tmp_path):
    return Checkpoint(Path(shutil.copytree(sound, tmp_path / "checkpoint")))


@pytest.fixture
def vectors(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", method="palette", bits=2, grain=10, cluster_dim=4)
    return Checkpoint(Path(shutil.copytree(source, tmp_path / "vectors")))


def flip(content, byte, bit):
    return content[:byte] + bytes([content[byte] ^ (1 << bit)]) + content[byte + 1 :]


def test_the_undamaged_checkpoint_holds_every_kind_of_tensor_and_loads(checkpoint, sound):
    names = checkpoint.header.keys()
    codebooks = (f"weight_{kind}" for kind in ("scale", "zero", "lut", "basis"))
    for suffix in ("weight", *codebooks, "bias", "running_var", "num_batches_tracked"):
        assert any(name.endswith(f".{suffix}") for name in names), suffix
    checkpoint.write(checkpoint.file.read_bytes())
    checkpoint.edit_config(lambda config: None)
    assert_same_tensors(state(load("resnet", checkpoint.directory)), state(load("resnet", sound)))


# --- cut-off files and lying headers ----------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(checkpoint):
    content, start = checkpoint.file.read_bytes(), checkpoint.data_start
    ends = {entry["data_offsets"][1] for name, entry in checkpoint.header.items() if name != "__metadata__"}
    sizes = {0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(content) - 1}
    sizes |= {start + end for end in ends} | set(random.Random(0).sample(range(len(content)), 20))
    for size in sorted(sizes - {len(content)}):
        checkpoint.write(content[:size])
        checkpoint.refused()


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096])
def test_a_file_with_bytes_after_its_end_is_refused(checkpoint, tail):
    checkpoint.write(checkpoint.file.read_bytes() + tail)
    checkpoint.refused()


@pytest.mark.parametrize("change", ["zero", "one less", "one more", "as long as the file", "huge", "negative"])
def test_a_header_length_that_lies_is_refused(checkpoint, change):
    content, size = checkpoint.file.read_bytes(), checkpoint.header_size
    lie = {
        "zero": 0,
        "one less": size - 1,
        "one more": size + 1,
        "as long as the file": len(content) - 8,
        "huge": 2**62,
        "negative": 2**64 - 1,
    }[change]
    checkpoint.write(lie.to_bytes(8, "little") + content[8:])
    checkpoint.refused()


@pytest.mark.parametrize("text", [b"[]", b"1", b'"text"', b"{}", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff"])
def test_a_header_that_is_something_else_is_refused(checkpoint, text):
    checkpoint.write(len(text).to_bytes(8, "little") + text + checkpoint.file.read_bytes()[checkpoint.data_start :])
    checkpoint.refused()


@pytest.mark.parametrize("offsets", [[0, 10**9], [-4, 8], [10**9, 8], ["0", "8"], [0.0, 8.0], None])
def test_impossible_offsets_are_refused(checkpoint, offsets):
    header = checkpoint.header
    header[CLASSIFIER]["data_offsets"] = offsets
    checkpoint.write_header(header)
    checkpoint.refused()


def test_a_header_that_makes_two_tensors_share_their_bytes_is_refused(checkpoint):
    header = checkpoint.header
    first, second = (f"resnet.encoder.stages.0.layers.0.layer.{i}.normalization.bias" for i in (0, 1))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    checkpoint.write_header(header)
    checkpoint.refused()


def test_integers_relabelled_over_a_float_tensor_are_refused(checkpoint):
    header = checkpoint.header
    name = "classifier.1.bias"
    assert header[name]["dtype"] == "F32"
    header[name]["dtype"] = "I32"
    checkpoint.write_header(header)
    checkpoint.refused()


def test_text_in_place_of_the_weights_is_refused(checkpoint):
    checkpoint.write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    checkpoint.refused()


def test_a_cut_off_shard_is_refused(sound, tmp_path):
    load("resnet", sound).save_pretrained(tmp_path, max_shard_size=400)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1])
        Checkpoint(tmp_path).refused(match=f"{shard.name}.*{ADVICE}")
        shard.write_bytes(content)
    assert_same_tensors(state(load("resnet", tmp_path)), state(load("resnet", sound)))


# --- flipped bits -----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_tensor_is_refused(checkpoint):
    content, start = checkpoint.file.read_bytes(), checkpoint.data_start
    generator = random.Random(0)
    for name, entry in checkpoint.header.items():
        if name == "__metadata__":
            continue
        first, end = entry["data_offsets"]
        for byte in {first, end - 1, generator.randrange(first, end)}:
            checkpoint.write(flip(content, start + byte, generator.randrange(8)))
            checkpoint.refused()


def test_a_flipped_bit_anywhere_in_the_data_is_refused(checkpoint):
    content, start = checkpoint.file.read_bytes(), checkpoint.data_start
    generator = random.Random(1)
    for _ in range(150):
        checkpoint.write(flip(content, generator.randrange(start, len(content)), generator.randrange(8)))
        checkpoint.refused()


def test_a_flipped_bit_in_the_header_never_loads_another_model(checkpoint, sound):
    content, expected = checkpoint.file.read_bytes(), state(load("resnet", sound))
    generator = random.Random(2)
    refusals = 0
    for _ in range(150):
        checkpoint.write(flip(content, generator.randrange(checkpoint.data_start), generator.randrange(8)))
        try:
            model = load("resnet", checkpoint.directory)
        except Exception:
            refusals += 1
        else:
            assert_same_tensors(state(model), expected)
        checkpoint.write(content)
    assert refusals > 140


@pytest.mark.parametrize("name", [CLASSIFIER, f"{CLASSIFIER}_scale", f"{FIRST_CONV}_scale"])
def test_flipped_codes_and_codebooks_are_refused_in_half_precision_too(checkpoint, name):
    content, start = checkpoint.file.read_bytes(), checkpoint.data_start
    checkpoint.write(flip(content, start + checkpoint.header[name]["data_offsets"][0], 0))
    checkpoint.refused(dtype=torch.bfloat16)


# --- tensors that are gone, renamed or swapped ------------------------------------------------------------------------


def test_a_missing_tensor_is_refused(checkpoint):
    content = checkpoint.file.read_bytes()
    for name in load_file(checkpoint.file):
        checkpoint.edit_tensors(lambda tensors, name=name: tensors.pop(name))
        checkpoint.refused()
        checkpoint.write(content)


def test_a_renamed_tensor_is_refused(checkpoint):
    content = checkpoint.file.read_bytes()
    for name in (CLASSIFIER, f"{CLASSIFIER}_scale", "classifier.1.bias", "resnet.embedder.embedder.normalization.bias"):
        checkpoint.edit_tensors(lambda tensors, name=name: tensors.update({f"{name}_": tensors.pop(name)}))
        checkpoint.refused()
        checkpoint.write(content)


def test_swapped_tensors_of_equal_shape_are_refused(checkpoint):
    content = checkpoint.file.read_bytes()
    tensors = load_file(checkpoint.file)
    pairs = [
        (left, right)
        for left in tensors
        for right in tensors
        if left < right
        and (tensors[left].shape, tensors[left].dtype) == (tensors[right].shape, tensors[right].dtype)
        and not torch.equal(tensors[left], tensors[right])
    ]
    assert len(pairs) > 50
    for left, right in random.Random(3).sample(pairs, 40):

        def swap(tensors, left=left, right=right):
            tensors[left], tensors[right] = tensors[right], tensors[left]

        checkpoint.edit_tensors(swap)
        checkpoint.refused()
        checkpoint.write(content)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (CLASSIFIER, lambda codes: codes[:-1].clone()),
        (CLASSIFIER, lambda codes: codes.to(torch.int8)),
        (f"{CLASSIFIER}_scale", lambda scale: torch.cat([scale, scale])),
        (f"{CLASSIFIER}_scale", lambda scale: scale.half()),
        ("classifier.1.bias", lambda bias: bias[:-1].clone()),
        ("classifier.1.bias", lambda bias: bias.half()),
    ],
    ids=[
        "codes cut",
        "codes signed",
        "scales doubled",
        "scales in half precision",
        "bias cut",
        "bias in half precision",
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(checkpoint, name, edit):
    checkpoint.edit_tensors(lambda tensors: tensors.update({name: edit(tensors[name])}))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


def test_missing_codes_are_refused_even_where_size_mismatches_are_ignored(checkpoint):
    checkpoint.edit_tensors(lambda tensors: tensors.update({CLASSIFIER: tensors[CLASSIFIER][:-1].clone()}))
    checkpoint.refused(ignore_mismatched_sizes=True)


# --- config.json ------------------------------------------------------------------------------------------------------


def override(name, **options):
    def edit(config):
        overrides = dict(config["overrides"])
        overrides[name] = {**overrides[name], **options}
        config["overrides"] = list(overrides.items())

    return edit


def test_the_edited_weights_have_the_settings_that_the_tests_below_change():
    assert SETTINGS["overrides"][FIRST_CONV] == {"method": "uniform", "bits": 2, "grain": "tensor"}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 8},
        {"grain": "channel"},
        {"grain": 7},
        {"method": "palette"},
        {"method": "least_squares"},
        {"symmetric": False},
        {"grid": "midrise"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_other_settings_of_one_weight_is_refused(checkpoint, options):
    checkpoint.edit_config(override(FIRST_CONV, **options))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize("options", [{"bits": 3}, {"grain": "tensor"}, {"method": "uniform"}, {"grain": 9}], ids=str)
def test_a_config_that_asks_for_other_settings_of_all_weights_is_refused(compressed_checkpoint, tmp_path, options):
    source = compressed_checkpoint("resnet", method="palette", bits=2, grain=10)
    checkpoint = Checkpoint(Path(shutil.copytree(source, tmp_path / "checkpoint")))
    checkpoint.edit_config(lambda config: config.update(options))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize(
    "options",
    [{"cluster_dim": 2}, {"cluster_dim": 1}, {"cluster_dim": 5}, {"bits": 3}, {"grain": "tensor"}, {"grain": 8}],
    ids=str,
)
def test_a_config_that_asks_for_other_vectors_is_refused(vectors, options):
    vectors.edit_config(lambda config: config.update(options))
    vectors.refused(match=f"{ADVICE}|do not belong together")


def test_a_config_that_lost_its_vectors_is_refused(vectors):
    vectors.edit_config(lambda config: config.pop("cluster_dim"))
    vectors.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize(
    "options", [{"basis": "greedy"}, {"basis": "ternary"}, {"bits": 1}, {"grain": 7}, {"method": "palette"}], ids=str
)
def test_a_config_that_asks_for_another_basis_is_refused(compressed_checkpoint, tmp_path, options):
    source = compressed_checkpoint("resnet", method="least_squares", bits=2, grain=10)
    checkpoint = Checkpoint(Path(shutil.copytree(source, tmp_path / "checkpoint")))
    checkpoint.edit_config(
        lambda config: (config.pop("basis") if "method" in options else None, config.update(options))
    )
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


def test_scales_that_were_changed_are_refused(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", method="least_squares", bits=2, grain=10)
    checkpoint = Checkpoint(Path(shutil.copytree(source, tmp_path / "checkpoint")))
    checkpoint.edit_tensors(lambda tensors: tensors[f"{CLASSIFIER}_basis"].mul_(1.0001))
    checkpoint.refused()


def test_vectors_that_have_equally_many_codes_are_told_apart(compressed_checkpoint, tmp_path):
    # A group of 5 has two codes at 3 as at 4 elements a code, and the tables of 3 values would be read as such of 4
    source = compressed_checkpoint("resnet", method="palette", bits=1, grain=5, cluster_dim=3)
    checkpoint = Checkpoint(Path(shutil.copytree(source, tmp_path / "checkpoint")))
    checkpoint.edit_config(lambda config: config.update(cluster_dim=4))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize(
    "edit",
    [
        lambda lut: lut.transpose(1, 2).contiguous(),
        lambda lut: lut.flatten(1),
        lambda lut: lut[..., :-1].contiguous(),
        lambda lut: lut.flip(1),
        lambda lut: lut.half(),
    ],
    ids=["transposed", "flat", "shorter vectors", "other order", "half precision"],
)
def test_tables_of_vectors_that_were_changed_are_refused(vectors, edit):
    name = f"{CLASSIFIER}_lut"
    vectors.edit_tensors(lambda tensors: tensors.update({name: edit(tensors[name])}))
    vectors.refused()


def test_codes_of_vectors_that_were_cut_or_flipped_are_refused(vectors):
    content = vectors.file.read_bytes()
    first, end = vectors.header[CLASSIFIER]["data_offsets"]
    for byte in (first, end - 1):
        vectors.write(flip(content, vectors.data_start + byte, 0))
        vectors.refused()
    vectors.write(content)
    vectors.edit_tensors(lambda tensors: tensors.update({CLASSIFIER: tensors[CLASSIFIER][:-1].clone()}))
    vectors.refused()


def test_group_sizes_that_give_equally_many_groups_are_told_apart(compressed_checkpoint, tmp_path):
    # 36 inputs a channel: three groups of 10 and one of 6, or four groups of 9
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    source = compressed_checkpoint("resnet", overrides={name: {"bits": 4, "grain": 10}})
    checkpoint = Checkpoint(Path(shutil.copytree(source, tmp_path / "checkpoint")))
    checkpoint.edit_config(override(name, grain=9))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize("options", [{"skip": [CLASSIFIER]}, {"include": [CLASSIFIER]}, {"min_numel": 100}], ids=str)
def test_a_config_that_selects_other_weights_is_refused(compressed_checkpoint, tmp_path, options):
    checkpoint = Checkpoint(Path(shutil.copytree(compressed_checkpoint("resnet"), tmp_path / "checkpoint")))
    checkpoint.edit_config(lambda config: config.update(options))
    checkpoint.refused(match=f"{ADVICE}|do not belong together")


@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.5])
def test_another_format_version_is_refused(checkpoint, version):
    checkpoint.edit_config(lambda config: config.update(format_version=version))
    checkpoint.refused(match="format version .* upgrade with `pip install -U hf_r2`")


@pytest.mark.parametrize("digests", [None, {}, "0" * 64, {"codes": "0" * 64}], ids=str)
def test_wrong_or_absent_digests_are_refused(checkpoint, digests):
    checkpoint.edit_config(lambda config: config.update(sha256=digests))
    checkpoint.refused()


def test_a_config_without_digests_is_refused(checkpoint):
    checkpoint.edit_config(lambda config: config.pop("sha256"))
    checkpoint.refused()


@pytest.mark.parametrize("key", ["codes", "rest", "rest_dtypes"])
def test_a_config_without_one_of_the_digests_is_refused(checkpoint, key):
    checkpoint.edit_config(lambda config: config["sha256"].pop(key))
    checkpoint.refused()


def test_an_unknown_key_is_refused_with_the_nearest_known_one(checkpoint):
    checkpoint.edit_config(lambda config: config.update(bitz=4))
    checkpoint.refused(match="unknown key 'bitz'.*did you mean 'bits'")


def test_an_unknown_method_is_refused(checkpoint):
    checkpoint.edit_config(lambda config: config.update(method="ternary"))
    checkpoint.refused(match="unknown method 'ternary': use one of")


def test_a_checkpoint_whose_config_lost_its_quantization_config_does_not_load(checkpoint):
    path = checkpoint.directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load("resnet", checkpoint.directory)
