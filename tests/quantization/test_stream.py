"""Compression tensor by tensor: the same bytes as of the whole model, from shards, through kills and damage."""

import json
import shutil
import signal
import subprocess
import weakref

import pytest
import torch
from checkpoint_models import (
    FAMILIES,
    assert_same_tensors,
    build,
    load,
    mixed,
    python_command,
    python_environment,
    run_python,
    state,
)
from safetensors.torch import load_file, save_file

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.quantization import compress, quantizer, stream
from hf_r2.quantization.integrity import content_digests
from hf_r2.quantization.quantizer import load_float_model
from hf_r2.quantization.stream import NotStreamable, plan_stream
from hf_r2.quantization.tensor_files import StoredTensor, stored_tensors
from hf_r2.quantization.workers import start_workers
from hf_r2.report import Manifest

RENAMED = ("videomae", "vit")  # transformers reads and writes their files under other names than its modules have
STREAMED = sorted(FAMILIES.keys() - set(RENAMED))
PALETTE = {"method": "palette", "bits": 2}
EVERYTHING = {**PALETTE, "include": ["*"]}


def streamed(source, target, workers=2, **settings):
    return R2Quantizer.from_pretrained(source).stream(target, R2QuantizationConfig(**settings), workers)


def whole(source, target, **settings):
    compress(load_float_model(str(source)), R2QuantizationConfig(**settings)).save_pretrained(target)
    return target


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def shards(tmp_path):
    """A float checkpoint in many shards."""
    build("gpt2").save_pretrained(tmp_path / "float", max_shard_size=1000)
    assert len(list((tmp_path / "float").glob("model-*.safetensors"))) > 4
    return tmp_path / "float"


# --- the same as of the whole model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", STREAMED)
def test_files_are_those_of_the_whole_model(family, dtype, tmp_path):
    build(family).to(dtype).save_pretrained(tmp_path / "float")
    ours = streamed(tmp_path / "float", tmp_path / "streamed", **mixed(family))
    theirs = whole(tmp_path / "float", tmp_path / "whole", **mixed(family))
    assert set(names(theirs)) <= set(names(ours))
    for file in names(theirs):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.parametrize("settings", [PALETTE, EVERYTHING, {"activations": {"bits": 8}}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_shards_hold_the_tensors_and_digests_of_the_whole_model(family, settings, tmp_path):
    build(family).save_pretrained(tmp_path / "float", max_shard_size=2000)
    ours = streamed(tmp_path / "float", tmp_path / "streamed", **settings)
    theirs = whole(tmp_path / "float", tmp_path / "whole", **settings)
    shards = sorted(file.name for file in ours.glob("*.safetensors"))
    assert shards == sorted(file.name for file in (tmp_path / "float").glob("*.safetensors"))
    assert_same_tensors(tensors(ours), tensors(theirs))
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(ours / shard)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(ours).values())
    assert_same_tensors(state(load(family, ours)), state(load(family, theirs)))


@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_the_manifest_says_what_that_of_the_whole_model_says(family, float_checkpoint, tmp_path, monkeypatch):
    source, config = float_checkpoint(family), R2QuantizationConfig(**mixed(family))
    R2Quantizer.from_pretrained(source).quantize(tmp_path / "streamed", config)

    def refuse(*arguments):
        raise NotStreamable("for comparison")

    monkeypatch.setattr(quantizer, "plan_stream", refuse)
    R2Quantizer.from_pretrained(source).quantize(tmp_path / "whole", config)
    ours, theirs = (Manifest.load(tmp_path / name).last("quantize") for name in ("streamed", "whole"))
    assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
    assert ours.pop("finished") and theirs.pop("finished")
    assert ours == theirs


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers, shards, tmp_path):
    ours = streamed(shards, tmp_path / "ours", workers, **PALETTE)
    assert_same_tensors(tensors(ours), tensors(whole(shards, tmp_path / "whole", **PALETTE)))


def test_no_more_tensors_are_begun_than_there_are_workers_and_one():
    begun, finished = [], []
    with start_workers(2) as pool:
        for result in pool.in_order(lambda item: begun.append(item) or item, range(20)):
            finished.append(result)
            assert len(begun) <= len(finished) + 3
    assert finished == list(range(20))


def test_digests_hold_no_more_than_two_tensors_at_a_time(shards, tmp_path, monkeypatch):
    read, alive, most = StoredTensor.read, [], 0

    def note(self):
        nonlocal most
        tensor = read(self)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    out = streamed(shards, tmp_path / "out", **PALETTE)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in stored_tensors(file).items()}
    monkeypatch.setattr(StoredTensor, "read", note)
    content_digests({}, {}, stream._Stored(stored))
    assert len(stored) > 10
    assert most <= 2


def test_threads_of_torch_are_as_before(shards, tmp_path):
    before = torch.get_num_threads()
    streamed(shards, tmp_path / "out", **PALETTE)
    assert torch.get_num_threads() == before


def test_a_checkpoint_in_the_hubs_cache_is_streamed(float_checkpoint, tmp_path):
    repository = tmp_path / "cache/models--me--toy"
    shutil.copytree(float_checkpoint("resnet"), repository / "snapshots/0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    code = """
import os, sys
os.environ["HF_HUB_CACHE"] = sys.argv[1]
from hf_r2 import R2QuantizationConfig, R2Quantizer
R2Quantizer.from_pretrained("me/toy").stream(sys.argv[2], R2QuantizationConfig("palette", bits=2))
"""
    run_python(code, tmp_path / "cache", tmp_path / "out")
    theirs = whole(float_checkpoint("resnet"), tmp_path / "whole", **PALETTE)
    for file in names(theirs):
        assert (tmp_path / "out" / file).read_bytes() == (theirs / file).read_bytes(), file
    stage = Manifest.load(tmp_path / "out").last("quantize")
    assert stage["base_model"] == "me/toy"
    assert stage["bytes"]["float"] == (float_checkpoint("resnet") / "model.safetensors").stat().st_size


# --- what takes the whole model ---------------------------------------------------------------------------------------


def edited(source, edit):
    """Edit the tensors of a checkpoint in one file."""
    content = load_file(source / "model.safetensors")
    edit(content)
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture
def gpt2(float_checkpoint, tmp_path):
    return shutil.copytree(float_checkpoint("gpt2"), tmp_path / "float")


@pytest.mark.parametrize("family", RENAMED)
def test_renamed_tensors_take_the_whole_model(family, float_checkpoint, tmp_path):
    source = float_checkpoint(family)
    with pytest.raises(ValueError, match=r"cannot be streamed \(the files do not have .*\): use quantize"):
        streamed(source, tmp_path / "out", **PALETTE)
    R2Quantizer.from_pretrained(source).quantize(tmp_path / "out", R2QuantizationConfig(**PALETTE))
    assert_same_tensors(tensors(tmp_path / "out"), tensors(whole(source, tmp_path / "whole", **PALETTE)))


def test_steps_on_float_weights_take_the_whole_model(float_checkpoint):
    with pytest.raises(NotStreamable, match=r"refine=\['equalize'\] works on the whole model"):
        plan_stream(str(float_checkpoint("resnet")), R2QuantizationConfig(refine=["equalize"]))


def test_tensors_in_another_dtype_than_the_config_asks_for_take_the_whole_model(gpt2):
    edited(gpt2, lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    with pytest.raises(NotStreamable, match=r"stored in torch.bfloat16, and config.json asks for float32"):
        plan_stream(str(gpt2), R2QuantizationConfig())


def test_a_tied_tensor_that_is_stored_too_takes_the_whole_model(gpt2):
    edited(gpt2, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    with pytest.raises(NotStreamable, match=r"'lm_head.weight', which is tied"):
        plan_stream(str(gpt2), R2QuantizationConfig())


def test_a_checkpoint_that_is_no_safetensors_takes_the_whole_model(gpt2):
    (gpt2 / "model.safetensors").unlink()
    with pytest.raises(NotStreamable, match=r"has no model\.safetensors"):
        plan_stream(str(gpt2), R2QuantizationConfig())


def test_a_tensor_that_the_model_does_not_have_is_left_out(gpt2, tmp_path):
    edited(gpt2, lambda tensors: tensors.update({"transformer.old": torch.ones(3)}))
    ours = streamed(gpt2, tmp_path / "streamed", **PALETTE)
    assert_same_tensors(tensors(ours), tensors(whole(gpt2, tmp_path / "whole", **PALETTE)))


def test_missing_weights_are_refused_as_for_the_whole_model(gpt2, tmp_path):
    edited(gpt2, lambda tensors: tensors.pop("transformer.wpe.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors of GPT2LMHeadModel, for example 'transformer.wpe.weight'"):
        R2Quantizer.from_pretrained(gpt2).quantize(tmp_path / "out", R2QuantizationConfig(**PALETTE))


def test_a_weight_with_nan_is_refused_by_name_without_a_trace(gpt2, tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    edited(gpt2, lambda tensors: tensors[name][0].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{name}.* NaN"):
        streamed(gpt2, tmp_path / "out", **PALETTE)
    assert names(tmp_path) == ["float"]


def test_a_float_file_that_was_cut_off_is_refused(gpt2, tmp_path):
    content = (gpt2 / "model.safetensors").read_bytes()
    (gpt2 / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"cannot be read .* download or save it again"):
        streamed(gpt2, tmp_path / "out", **PALETTE)


# --- interruptions ----------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, shard):
    """Fail while a shard is written."""
    write = stream._write_shard

    def fail(plan, name, *arguments):
        if name == shard:
            raise OSError("disk full")
        return write(plan, name, *arguments)

    monkeypatch.setattr(stream, "_write_shard", fail)


def interrupted(source, target, monkeypatch, **settings):
    """Leave an unfinished run with two shards, and return where it lies and their names."""
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    interrupt_at(monkeypatch, shards[2])
    with pytest.raises(OSError, match="disk full"):
        streamed(source, target, **settings)
    monkeypatch.undo()
    assert not target.exists()
    return target.with_name(f".{target.name}.unfinished"), shards[:2]


def written(monkeypatch):
    """Note the shards that are written from here on."""
    write, seen = stream._write_shard, []

    def note(plan, name, *arguments):
        seen.append(name)
        return write(plan, name, *arguments)

    monkeypatch.setattr(stream, "_write_shard", note)
    return seen


def test_the_next_run_keeps_finished_shards(shards, tmp_path, monkeypatch):
    _, done = interrupted(shards, tmp_path / "out", monkeypatch, **PALETTE)
    seen = written(monkeypatch)
    out = streamed(shards, tmp_path / "out", **PALETTE)
    assert seen == sorted(file.name for file in shards.glob("*.safetensors"))[2:]
    assert not set(done) & set(seen)
    straight = streamed(shards, tmp_path / "straight", **PALETTE)
    assert names(out) == names(straight)
    for file in set(names(out)) - {"manifest.json"}:
        assert (out / file).read_bytes() == (straight / file).read_bytes(), file
    facts = [Manifest.load(path).last("quantize")["weights"] for path in (out, straight)]
    assert facts[0] == facts[1]
    assert names(tmp_path) == ["float", "out", "straight"]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_finished_shard_that_was_damaged_is_written_again(damage, shards, tmp_path, monkeypatch):
    unfinished, done = interrupted(shards, tmp_path / "out", monkeypatch, **PALETTE)
    file = unfinished / done[0]
    content = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(
        content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
    )
    seen = written(monkeypatch)
    out = streamed(shards, tmp_path / "out", **PALETTE)
    assert done[0] in seen
    assert done[1] not in seen
    assert_same_tensors(tensors(out), tensors(whole(shards, tmp_path / "whole", **PALETTE)))


def test_another_config_starts_anew(shards, tmp_path, monkeypatch):
    _, done = interrupted(shards, tmp_path / "out", monkeypatch, **PALETTE)
    seen = written(monkeypatch)
    out = streamed(shards, tmp_path / "out", method="uniform", bits=4)
    assert set(done) < set(seen)
    assert_same_tensors(tensors(out), tensors(whole(shards, tmp_path / "whole", method="uniform", bits=4)))


def test_another_source_starts_anew(shards, tmp_path, monkeypatch):
    _, done = interrupted(shards, tmp_path / "out", monkeypatch, **PALETTE)
    build("gpt2", seed=1).save_pretrained(shards, max_shard_size=1000)
    seen = written(monkeypatch)
    out = streamed(shards, tmp_path / "out", **PALETTE)
    assert set(done) < set(seen)
    assert_same_tensors(tensors(out), tensors(whole(shards, tmp_path / "whole", **PALETTE)))


# Writes two shards, says so and waits for its end
KILLED = """
import sys
import time

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.quantization import stream

write = stream._write_shard
count = 0


def wait(*arguments):
    global count
    count += 1
    if count == 3:
        print("two", flush=True)
        time.sleep(600)
    return write(*arguments)


stream._write_shard = wait
R2Quantizer.from_pretrained(sys.argv[1]).stream(sys.argv[2], R2QuantizationConfig("palette", bits=2))
"""


def test_a_killed_process_leaves_its_shards_to_the_next(shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with subprocess.Popen(
        python_command(KILLED, shards, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
        text=True,
    ) as process:
        assert process.stdout.readline() == "two\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    seen = written(monkeypatch)
    streamed(shards, out, **PALETTE)
    assert seen == sorted(file.name for file in shards.glob("*.safetensors"))[2:]
    assert_same_tensors(tensors(out), tensors(whole(shards, tmp_path / "whole", **PALETTE)))
