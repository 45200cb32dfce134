import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.report import Manifest, render_card

RECIPE = {"path": "recipe.yaml", "text": "name: toy\nbits: 3"}
DATA = {"name": "digits", "hub_name": None, "split": "test", "train_examples": 5, "fingerprint": "f00d"}


def row(recipe, weights, accuracy, **facts):
    return {
        "recipe": recipe, "weights": weights, "batch_norm": "as trained", "accuracy": accuracy, "collapsed": False,
        "recovery": accuracy / 0.8, "crest_factor": 2.0, "bytes": 1000, "ratio": 4.0, "examples": 50, **facts,
    }  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "toy")
    R2Quantizer.from_pretrained(tmp_path / "toy").quantize(
        tmp_path / "toy-3bit", R2QuantizationConfig("palette", bits=3, grain="tensor")
    )
    return tmp_path / "toy-3bit"


def evaluate(checkpoint, *rows):
    manifest = Manifest.load(checkpoint)
    facts = {"model_class": "AutoModelForImageClassification", "pipeline_tag": "image-classification"}
    manifest.add(
        "evaluate", name="toy-3bit", recipe=RECIPE, data=DATA, rows=rows, seconds=3.2, picture="w.png", **facts
    )
    manifest.save(checkpoint)


def test_card_of_an_unevaluated_checkpoint_claims_no_accuracy(checkpoint):
    card = render_card(checkpoint)
    assert card.data.base_model == "toy"
    assert card.data.eval_results is None
    for section in ("## Results", "## Reproduce", "accuracy", "![", "None"):
        assert section not in card.text
    assert "palettes" in card.text
    assert ModelCard.load(checkpoint / "README.md").text == card.text


def test_card_names_a_binary_basis(checkpoint):
    out = checkpoint.with_name("binary")
    config = R2QuantizationConfig(
        "least_squares", bits=2, basis="ternary", overrides={"classifier.*": {"basis": "optimal", "bits": 3}}
    )
    R2Quantizer.from_pretrained(checkpoint.with_name("toy")).quantize(out, config)
    card = render_card(out)
    assert "2-bit weights by least-squares binary quantization, whose levels are signed sums" in card.text
    assert "| least_squares 2-bit ternary, channel" in card.text
    assert "| least_squares 3-bit, channel" in card.text
    assert "2001.02786" in card.text
    assert "1701.07204" not in card.text


@pytest.mark.parametrize(
    ("aware", "activations", "sentence", "inputs", "sources"),
    [
        ("lsq", {"method": "lsq"}, "whose step was learned", "2-bit uniform levels of learned step", ["1902.08153"]),
        ("dorefa", {"method": "pact"}, "tanh of the weights", "learned clip (PACT)", ["1606.06160", "1805.06085"]),
        ("pact", {"method": "pact"}, "as PACT does (DoReFa)", "learned clip (PACT)", ["1805.06085"]),
        ("ewgs", {"method": "uniform", "range": "static"}, "(EWGS)", "levels over static ranges", ["2104.00903"]),
    ],
)
def test_card_names_how_grids_were_trained(checkpoint, aware, activations, sentence, inputs, sources):
    manifest = Manifest.load(checkpoint)
    config = R2QuantizationConfig(bits=2, aware=aware, activations=activations).to_dict()
    manifest.last("quantize")["quantization_config"] = config
    manifest.save(checkpoint)
    text = render_card(checkpoint).text
    assert "2-bit weights by uniform quantization" in text
    assert sentence in text
    assert inputs in text
    known = ("1902.08153", "1606.06160", "1805.06085", "2104.00903")
    assert [source for source in known if source in text] == sources


def test_card_says_over_how_many_weights_a_code_of_vectors_reaches(checkpoint):
    assert "| palette 3-bit, tensor" in render_card(checkpoint).text
    assert "over" not in " ".join(render_card(checkpoint).data.tags)
    out = checkpoint.with_name("vectors")
    config = R2QuantizationConfig(
        "palette", bits=4, grain="tensor", cluster_dim=4, overrides={"classifier.*": {"cluster_dim": 1}}
    )
    R2Quantizer.from_pretrained(checkpoint.with_name("toy")).quantize(out, config)
    card = render_card(out)
    assert "# toy-4bit-over-4" in card.text
    assert "4/4-bit weights by palettes of vectors: look-up tables found by k-means, whose 4-bit codes" in card.text
    assert "each name 4 weights" in card.text
    assert "| palette 4-bit over 4, tensor" in card.text
    assert "| palette 4-bit, tensor" in card.text
    assert "4-bit-over-4" in card.data.tags
    assert "4-bit" not in card.data.tags


def test_card_of_an_evaluated_checkpoint_shows_what_was_measured(checkpoint):
    evaluate(checkpoint, row("R2", "float", 0.8), row("R2", "3-bit", 0.6, published=True))
    card = render_card(checkpoint)
    assert "60.0 % accuracy on digits (test, 50 examples), 75.0 % of the float model's" in card.text
    assert "![Histograms of the weights, float and compressed](w.png)" in card.text
    assert "name: toy\nbits: 3" in card.text
    assert "f00d" in card.text
    reloaded = ModelCard.load(checkpoint / "README.md")
    assert reloaded.data.eval_results[0].metric_value == 0.6
    assert reloaded.data.base_model_relation == "quantized"


def test_card_of_a_model_without_a_float_one_claims_no_recovery(checkpoint):
    evaluate(checkpoint, row("lsq", "3-bit", 0.6, published=True, recovery=None))
    text = render_card(checkpoint).text
    assert "60.0 % accuracy on digits (test, 50 examples).\n" in text
    assert "of the float model's" not in text


def test_card_says_that_a_checkpoint_collapsed(checkpoint):
    evaluate(checkpoint, row("R2", "3-bit", 0.3, collapsed=True, published=True))
    assert "**This checkpoint collapsed" in render_card(checkpoint).text


def test_card_describes_range_regularization_when_the_float_model_had_it(checkpoint):
    assert "range regularization" not in render_card(checkpoint).text
    manifest = Manifest.load(checkpoint)
    r2 = {"r2_mode": "loss", "r2_loss": "l_inf", "r2_strength": 0.1, "r2_grain": "tensor", "r2_clip": 1.5}
    manifest.add("train", r2=r2, seed=0)
    manifest.save(checkpoint)
    card = render_card(checkpoint)
    assert "(`l_inf`, strength 0.1, grain tensor)" in card.text
    assert "range-regularization" in card.data.tags
    for mode, words in {"clip": "clips each group at 1.5 times its rms", "prox": "takes a proximal step"}.items():
        manifest.add("train", r2={**r2, "r2_mode": mode}, seed=0)
        manifest.save(checkpoint)
        assert words in render_card(checkpoint).text


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("start", "distilled from the float model that its training started from: "),
        ("me/big", "distilled from `me/big`: "),
    ],
)
def test_card_names_the_teacher_when_there_was_one(checkpoint, teacher, words):
    assert "istil" not in render_card(checkpoint).text
    manifest = Manifest.load(checkpoint)
    manifest.add("train", r2=None, distillation={"teacher": teacher, "temperature": 2.0, "share": 0.9}, seed=0)
    manifest.save(checkpoint)
    text = render_card(checkpoint).text
    assert words + "90 % of the loss is the Kullback-Leibler divergence" in text
    assert "at temperature 2.0." in text
    assert "arxiv.org/abs/1503.02531" in text


def test_rendering_twice_gives_the_same_file(checkpoint):
    render_card(checkpoint)
    first = (checkpoint / "README.md").read_bytes()
    render_card(checkpoint)
    assert (checkpoint / "README.md").read_bytes() == first


def test_directory_without_a_compressed_checkpoint_has_no_card(tmp_path):
    with pytest.raises(ValueError, match=r"R2Quantizer\.quantize"):
        render_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_card_takes_over_the_license_of_the_float_model(checkpoint):
    assert render_card(checkpoint).data.license is None
    toy, out = checkpoint.with_name("toy"), checkpoint.with_name("licensed")
    (toy / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    R2Quantizer.from_pretrained(toy).quantize(out, R2QuantizationConfig())
    assert render_card(out).data.license == "mit"


def test_card_shows_both_ways_to_load_when_there_is_a_float_revision(checkpoint):
    assert "<this repository or a local copy>" in render_card(checkpoint).text
    manifest = Manifest.load(checkpoint)
    manifest.add("publish", repo_id="me/toy-3bit", float_revision=None)
    manifest.save(checkpoint)
    text = render_card(checkpoint).text
    assert 'from_pretrained("me/toy-3bit")' in text
    assert "hf-r2 verify me/toy-3bit" in text
    assert "revision=" not in text
    manifest.add("publish", repo_id="me/toy-3bit", float_revision="float")
    manifest.save(checkpoint)
    assert 'from_pretrained("me/toy-3bit", revision="float")' in render_card(checkpoint).text


def test_card_shows_how_close_the_model_is_to_its_float_model_if_that_was_measured(checkpoint):
    evaluate(checkpoint, row("toy", "3-bit", 0.6, published=True))
    assert "Kullback" not in render_card(checkpoint).text
    evaluate(checkpoint, row("toy", "3-bit", 0.6, published=True, agreement=0.875, kl=0.01234))
    text = render_card(checkpoint).text
    assert "predicts for 87.5 % of the examples; the mean Kullback-Leibler divergence" in text
    assert "is 0.0123 nats" in text


def test_card_without_a_recipe_shows_the_commands_and_versions(checkpoint):
    manifest = Manifest.load(checkpoint)
    manifest.last("quantize")["environment"]["command"] = "hf-r2 quantize toy toy-3bit"
    manifest.save(checkpoint)
    text = render_card(checkpoint).text
    assert "```bash\nhf-r2 quantize toy toy-3bit\n```" in text
    assert "\n- torch " in text
    evaluate(checkpoint, row("toy", "3-bit", 0.6, published=True))
    assert "## Commands" not in render_card(checkpoint).text


def results_of(checkpoint):
    files = sorted((checkpoint / ".eval_results").glob("*"))
    return {file.name: parse_eval_result_entries(yaml.safe_load(file.read_text())) for file in files}


def test_results_on_data_of_the_hub_are_written_as_the_hub_reads_them(checkpoint, monkeypatch):
    evaluate(checkpoint, row("toy", "3-bit", 0.6, published=True))
    render_card(checkpoint)
    assert results_of(checkpoint) == {}, "digits are no data set of the Hub"
    monkeypatch.setitem(DATA, "hub_name", "org/shapes")
    monkeypatch.setitem(DATA, "revision", "c0ffee")
    evaluate(checkpoint, row("toy", "float", 0.8), row("toy", "3-bit", 0.6, published=True))
    card = render_card(checkpoint)
    assert card.data.eval_results[0].dataset_type == "org/shapes"
    (entry,) = results_of(checkpoint)["org--shapes.yaml"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/shapes", "default", 0.6)
    assert entry.dataset_revision == "c0ffee"
    assert entry.notes == "accuracy (0-1) on the test split, 50 examples"
    monkeypatch.setitem(DATA, "hub_name", "org/others")
    evaluate(checkpoint, row("toy", "3-bit", 0.6, published=True))
    render_card(checkpoint)
    assert list(results_of(checkpoint)) == ["org--others.yaml"], "earlier results do not stay"


def test_the_lines_to_load_on_a_card_work(checkpoint):
    text = render_card(checkpoint).text
    program = text.split("```python\n")[1].split("```")[0]
    assert "from transformers import ResNetForImageClassification" in program
    variables = {}
    exec(program.replace("<this repository or a local copy>", str(checkpoint)), variables)
    assert variables["model"].hf_quantizer.encoded
