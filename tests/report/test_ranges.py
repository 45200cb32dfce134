"""What a range report measures: weights one after another, and what the manifest adds."""

import json
import math
import weakref

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer, weight_statistics
from hf_r2.quantization.tensor_files import StoredTensor
from hf_r2.report import Manifest
from hf_r2.report.histogram import HALF, histogram
from hf_r2.report.page import measure, short_labels, summary
from hf_r2.report.ranges import CURVES

LOG = [
    {"loss": 1.5, "crest_factor": 3.0, "learning_rate": 0.1, "step": 10},
    {"loss": None, "crest_factor": 2.5, "learning_rate": 0.05, "step": 20},
    {"loss": 0.5, "crest_factor": 2.0, "learning_rate": 0.01, "step": 30},
    {"eval_loss": 0.7, "step": 30},
    {"train_runtime": 2.0, "step": 30},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges")
    model.save_pretrained(path / "float")
    manifest = Manifest()
    manifest.add("train", log_history=LOG)
    manifest.save(path / "float")
    settings = R2QuantizationConfig("uniform", bits=2, grain="tensor", overrides={"classifier.*": {"bits": 8}})
    R2Quantizer.from_pretrained(path / "float").quantize(path / "compressed", settings)
    return path


@pytest.fixture
def edited(directory, tmp_path):
    """Write another manifest beside the compressed weights."""

    def edit(change):
        for file in (directory / "compressed").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        content = json.loads((tmp_path / "manifest.json").read_text())
        change({stage["stage"]: stage for stage in content["stages"]})
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        return str(tmp_path)

    return edit


def test_a_float_checkpoint_has_its_statistics_histograms_and_curves(model, directory):
    (floats,) = measure([str(directory / "float")])
    expected = weight_statistics(model)
    assert [weight.statistics for weight in floats.weights.values()] == expected
    assert list(floats.weights) == [weight.name for weight in expected]
    for name, weight in floats.weights.items():
        assert np.array_equal(weight.counts, histogram(model.get_parameter(name), weight.statistics.rms))
        assert (weight.before, weight.sqnr) == (None, weight.statistics.sqnr)
    assert floats.curves == {
        "loss": [(10, 1.5), (30, 0.5)],
        "crest_factor": [(10, 3.0), (20, 2.5), (30, 2.0)],
        "learning_rate": [(10, 0.1), (20, 0.05), (30, 0.01)],
    }
    assert list(floats.curves) == [name for name in CURVES if name in floats.curves]


def test_a_compressed_checkpoint_knows_its_float_weights_from_the_manifest(directory):
    floats, compressed = measure([str(directory / "float"), str(directory / "compressed")])
    assert compressed.curves == floats.curves
    for name, weight in compressed.weights.items():
        before, statistics = weight.before, floats.weights[name].statistics
        assert weight.sqnr == statistics.sqnr
        assert (before.rms, before.crest_factor, before.kurtosis) == (
            statistics.rms, statistics.crest_factor, statistics.kurtosis,
        )  # fmt: skip
        assert before.compressed_sqnr == pytest.approx(statistics.sqnr[8 if "classifier" in name else 2])
        occupied = weight.counts.nonzero()[0] - HALF
        # Three levels, in the unit of the float weight: −max, 0, max
        if "classifier" not in name:
            assert occupied.tolist() == [-(end := round(16 * statistics.crest_factor)), 0, end]
    assert summary(compressed)["storage"] == "uniform 2-bit, uniform 8-bit"
    assert summary(floats)["storage"] == "float32"
    assert summary(floats)["elements"] == sum(math.prod(w.statistics.shape) for w in floats.weights.values())


def test_without_a_manifest_a_compressed_weight_claims_no_sqnr(edited):
    directory = edited(lambda stages: stages["quantize"].update(weights=[], log_history=None))
    (compressed,) = measure([directory])
    assert {weight.before for weight in compressed.weights.values()} == {None}
    assert not any(weight.sqnr for weight in compressed.weights.values())


def test_what_was_lost_nowhere_has_an_infinite_sqnr(edited):
    directory = edited(lambda stages: [weight.update(compressed_sqnr=None) for weight in stages["quantize"]["weights"]])
    (compressed,) = measure([directory])
    assert {weight.before.compressed_sqnr for weight in compressed.weights.values()} == {math.inf}


@pytest.mark.parametrize(
    "change",
    [
        lambda stages: stages["quantize"].update(weights=[{"name": "x"}]),
        lambda stages: stages["quantize"].update(weights=[3]),
        lambda stages: stages["quantize"].update(weights={"a": 1}),
        lambda stages: stages["quantize"]["weights"][0].update(rms=-1),
        lambda stages: stages["quantize"]["weights"][0].update(rms=float("nan")),
        lambda stages: stages["quantize"]["weights"][0].update(sqnr={"two": 1}),
        lambda stages: stages["train"].update(log_history=7),
        lambda stages: stages["train"].update(log_history=[{"loss": 1.0}]),
        lambda stages: stages["train"].update(log_history=[{"loss": [1.0], "step": 1}]),
        lambda stages: stages["train"].update(log_history=["loss"]),
        lambda stages: stages["train"].update(log_history=[{"loss": 10**400, "step": 1}]),
    ],
)
def test_a_manifest_that_hf_r2_did_not_write_is_refused_with_what_to_do(edited, change):
    with pytest.raises(ValueError, match=r"manifest\.json does not describe its .* as hf_r2 does .*restore or delete"):
        measure([edited(change)])


def test_one_tensor_is_held_at_a_time(directory, monkeypatch):
    read, held = StoredTensor.read, []

    def watched(stored):
        assert not [name for name in held if name() is not None], "an earlier weight is still in memory"
        tensor = read(stored)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", watched)
    (floats,) = measure([str(directory / "float")])
    assert len(held) == len(floats.weights) > 3
    assert {weight.counts.nbytes for weight in floats.weights.values()} == {8 * (2 * HALF + 1)}


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["me/model"], ["me/model"]),
        (["/work/a/base/float", "/work/a/float"], ["base/float", "float"]),
        (["out/float", "out/float/compressed"], ["float", "float/compressed"]),
        (["me/a", "me/b", "you/a"], ["me/a", "me/b", "you/a"]),
        (["me/a", "me/b"], ["a", "b"]),
        (["x/a\x00\n\udcff", "x/<b>$"], ["a\ufffd\ufffd\ufffd", "<b>$"]),
    ],
)
def test_labels_are_what_the_paths_do_not_share(sources, labels):
    assert short_labels(sources) == labels


def test_the_label_of_one_directory_is_its_name(tmp_path):
    assert short_labels([str(tmp_path)]) == [tmp_path.name]


@pytest.mark.parametrize("sources", [[], ["a", "a"], ["a", "b", "c", "d"]])
def test_checkpoints_are_one_to_three_and_different(sources):
    with pytest.raises(ValueError, match="name one to 3 different checkpoints"):
        measure(sources)
