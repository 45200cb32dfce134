import json

import pytest
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

from hf_r2.cli import app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("cli") / "toy", num_labels=3)


def save(path, num_labels):
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=num_labels)).save_pretrained(path)
    return path


def test_inspect_shows_every_weight(checkpoint):
    result = run(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 0
    assert "classifier.1.weight" in result.stdout


def test_inspect_prints_json(checkpoint):
    weights = json.loads(run(app, ["inspect", str(checkpoint), "--json"]).stdout)
    assert {"name", "crest_factor", "sqnr"} <= set(weights[0])


def test_quantize_leaves_a_checkpoint_with_its_card(checkpoint, tmp_path):
    result = run(app, ["quantize", str(checkpoint), str(tmp_path / "out"), "--method", "palette", "--bits", "2"])
    assert result.exit_code == 0, result.output
    AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "out" / "README.md").unlink()
    assert run(app, ["card", str(tmp_path / "out")]).exit_code == 0
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == card


def test_quantize_makes_palettes_of_vectors(checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "palette", "--bits", "4", "--grain", "tensor", "--cluster-dim", "4"]
    result = run(app, ["quantize", str(checkpoint), str(out), *options])
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(out)
    assert {encoded.settings.cluster_dim for encoded in model.hf_quantizer.encoded.values()} == {4}


def test_quantize_equalizes_and_leaves_outliers_outside(checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ["--refine", "equalize", "--refine", "absorb_bias", "--range", "percentile", "--percentile", "99"]
    result = run(app, ["quantize", str(checkpoint), str(out), *options])
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(out)
    assert {encoded.settings.percentile for encoded in model.hf_quantizer.encoded.values()} == {99.0}
    assert model.config.quantization_config.refine == ["equalize", "absorb_bias"]
    result = run(app, ["quantize", str(checkpoint), str(out), "--refine", "adaround"])
    assert result.exit_code == 1
    assert "needs a calibration_dataset" in result.output


def test_quantize_makes_ternary_weights(checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "least_squares", "--bits", "2", "--basis", "ternary"]
    result = run(app, ["quantize", str(checkpoint), str(out), *options])
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(out)
    assert {encoded.settings.basis for encoded in model.hf_quantizer.encoded.values()} == {"ternary"}


def test_plan_writes_what_quantize_reads(checkpoint, tmp_path):
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    options = ["--target-size", "7kB", "--method", "uniform", "--skip", "classifier.*", "--output", str(plan)]
    result = run(app, ["plan", str(checkpoint), *options])
    assert result.exit_code == 0, result.output
    assert "optimality gap 0.00%" in result.stdout
    assert plan.with_suffix(".png").is_file()
    assert run(app, ["quantize", str(checkpoint), str(out), "--config", str(plan)]).exit_code == 0
    assert 6_500 < (out / "model.safetensors").stat().st_size <= 7_000
    bits = {e.settings.bits for e in AutoModelForImageClassification.from_pretrained(out).hf_quantizer.encoded.values()}
    assert len(bits) > 1


def test_plan_measures_on_data(tmp_path):
    checkpoint = save(tmp_path / "digits", num_labels=10)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(checkpoint)
    options = ["--data", "digits", "--split", "validation_from_train", "--examples", "64"]
    options += ["--method", "uniform", "--target-bits", "5"]
    result = run(app, ["plan", str(checkpoint), *options, "--output", str(tmp_path / "plan.yaml")])
    assert result.exit_code == 0, result.output
    assert "measured KL" in result.stdout
    assert "cross-entropy" in result.stdout
    assert "recovery" in (tmp_path / "plan.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{model}", "--output", "{out}.yaml"], "give exactly one of"),
        (["plan", "{model}", "--output", "{out}.png", "--target-bits", "2"], "name a .yaml file"),
        (["plan", "{model}", "--output", "{out}/plan.yaml", "--target-bits", "2"], "in a folder that exists"),
        (
            ["plan", "{model}", "--output", "{out}.yaml", "--target-size", "5kB", "--target-bits", "2"],
            "give exactly one of",
        ),
        (["plan", "{model}", "--output", "{out}.yaml", "--target-size", "big"], "write 4MB"),
        (["plan", "{model}", "--output", "{out}.yaml", "--target-size", "1kB"], "cannot be planned"),
        (["plan", "{model}", "--output", "{out}.yaml", "--min-recovery", "0.9"], "give labelled data"),
        (
            ["plan", "{model}", "--output", "{out}.yaml", "--target-bits", "5", "--data", "digits"],
            "no split 'validation'; it has ['train', 'test'] and validation_from_train",
        ),
        (["quantize", "{model}", "{out}", "--bits", "1"], "bits=1"),
        (["quantize", "{model}", "{out}", "--cluster-dim", "2"], "'cluster_dim' is an option of method 'palette'"),
        (["quantize", "{model}", "{out}", "--method", "least_squares", "--basis", "ternary"], "set bits=2"),
        (["quantize", "{model}", "{out}", "--method", "pallete"], "unknown method 'pallete'"),
        (["inspect", "{out}/missing"], "error: "),
        (["card", "{out}"], "has no manifest"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_written(checkpoint, tmp_path, arguments, message):
    out = tmp_path / "out"
    result = run(app, [argument.format(model=checkpoint, out=out) for argument in arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_help_of_the_exports_names_an_extra_as_pip_takes_it():
    assert 'pip install "hf_r2[onnx]"' in run(app, ["export", "--help"]).output
