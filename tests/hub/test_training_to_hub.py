"""From training to a stranger's process, and what a trainer publishes."""

import sys

import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForImageClassification, default_data_collator
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_r2 import R2QuantizationConfig, R2Quantizer, R2Trainer, R2TrainingArguments
from hf_r2.evaluation import LabelledData, evaluate_checkpoint
from hf_r2.evaluation.data import to_pixels
from hf_r2.hub import push, verify
from hf_r2.report import Manifest, render_card
from hf_r2.report.results import record_figures

PALETTE = R2QuantizationConfig("palette", bits=2, grain="tensor")


@pytest.fixture
def make_trainer(hub, compressed, tmp_path):
    """Build a trainer of a tiny classifier of digits, which would publish as alice/digits."""
    source = compressed.with_name("digits-float")
    processor = AutoImageProcessor.from_pretrained(source)
    data = LabelledData("digits", "train").load().select(range(64))

    def make(quantization_config=None, **arguments):
        model = AutoModelForImageClassification.from_pretrained(source)
        plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
        plain |= {"max_steps": 2, "save_strategy": "no", "hub_model_id": "alice/digits", "r2_mode": "clip"}
        return R2Trainer(
            model,
            R2TrainingArguments(str(tmp_path / "run"), **{**plain, **arguments}),
            train_dataset=data.with_transform(to_pixels(processor, "image", "label")),
            data_collator=default_data_collator,
            processing_class=processor,
            quantization_config=quantization_config,
        )

    return make


def files_of(api, name="alice/digits", revision="main"):
    return {file.rfilename for file in api.model_info(name, revision=revision).siblings}


def commits(api, name="alice/digits"):
    return [commit.title for commit in api.list_repo_commits(name)]


@pytest.mark.slow
@torch.no_grad()
def test_a_model_trained_here_is_reloaded_and_verified_by_a_stranger(
    api, hub, monkeypatch, make_trainer, fresh_process, pixels, tmp_path
):
    hub.transport = "xet"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with torch.enable_grad():
        trainer = make_trainer()
        trainer.train()
    trainer.push_to_hub()
    model = R2Quantizer.from_pretrained("alice/digits").quantize(tmp_path / "small", PALETTE).eval()
    data = LabelledData("digits")
    record_figures(tmp_path / "small", data, evaluate_checkpoint(tmp_path / "small", data, "alice/digits"), seconds=1)
    push(tmp_path / "small", "alice/digits-2bit", float_revision="float")

    card = ModelCard.load("alice/digits-2bit")
    assert card.data.base_model == "alice/digits"
    assert "clips each group at 1.5 times its rms" in card.text, "the float model's manifest came along"
    program = (
        "import sys, torch, hf_r2; from hf_r2.cli import app; "
        "from transformers import AutoModelForImageClassification as Auto; "
        "model = Auto.from_pretrained('alice/digits-2bit').eval(); "
        "torch.save(model(torch.load(sys.argv[1], weights_only=True)).logits, sys.argv[2]); "
        "app(['verify', 'alice/digits-2bit'])"
    )
    torch.save(pixels, tmp_path / "pixels.pt")
    process = fresh_process(sys.executable, "-c", program, tmp_path / "pixels.pt", tmp_path / "logits.pt", check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "10 hold, 0 fail, 0 could not be checked" in process.stdout
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(pixels).logits)


def test_the_trainer_publishes_a_compressed_model_with_its_card_in_one_commit(api, make_trainer, tmp_path):
    trainer = make_trainer(PALETTE, r2_aware="dkm")
    trainer.train()
    commit = trainer.push_to_hub(commit_message="Trained")
    assert commits(api) == ["Trained", "initial commit"]
    assert api.model_info("alice/digits").sha == commit.oid
    names = {"README.md", "config.json", "manifest.json", "model.safetensors", "preprocessor_config.json"}
    assert files_of(api) == {*names, ".gitattributes"}
    card = ModelCard.load("alice/digits")
    assert card.data.base_model_relation == "quantized"
    assert "trained together with the weights" in card.text
    assert {check.result for check in verify("alice/digits")} == {"pass"}
    assert (tmp_path / "run" / "training_args.bin").is_file()


def test_pushing_again_keeps_the_figures_measured_since(api, make_trainer, tmp_path):
    trainer = make_trainer(PALETTE)
    trainer.train()
    trainer.save_model()
    render_card(tmp_path / "run")
    data = LabelledData("digits")
    record_figures(tmp_path / "run", data, evaluate_checkpoint(tmp_path / "run", data), seconds=1)
    trainer.push_to_hub()
    assert ModelCard.load("alice/digits").data.eval_results
    assert Manifest.load(tmp_path / "run").last("evaluate")


def test_a_float_model_gets_trainers_card_and_no_pickle(api, make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert trainer.push_to_hub(private=True, blocking=False).result().oid == api.model_info("alice/digits").sha
    assert api.model_info("alice/digits").private
    assert "training_args.bin" not in files_of(api)
    assert "Trainer" in ModelCard.load("alice/digits").text
    assert Manifest.load(hf_hub_download("alice/digits", "manifest.json").removesuffix("manifest.json")).last("train")


@pytest.mark.parametrize("quantization", [None, PALETTE], ids=["float", "compressed"])
def test_what_is_published_in_training_is_float_weights_without_pickles(api, hub, make_trainer, quantization):
    trainer = make_trainer(quantization, push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.train()
    steps = ["Training in progress, step 2", "Training in progress, step 1"] if quantization is None else []
    assert commits(api) == [*steps, "initial commit"]
    trainer.save_model()
    assert commits(api) == ["Model save", *steps, "initial commit"]
    for commit in api.list_repo_commits("alice/digits"):
        assert not [name for name in files_of(api, revision=commit.commit_id) if name.endswith((".bin", ".pt", ".pth"))]
    AutoModelForImageClassification.from_pretrained("alice/digits")


def test_optimizer_states_are_not_published(make_trainer):
    with pytest.raises(ValueError, match="optimizer states, which are pickles"):
        make_trainer(push_to_hub=True, hub_strategy="checkpoint")


@torch.no_grad()
def test_transformers_own_push_keeps_the_codes(api, transport, compressed, pixels, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(compressed).eval()
    model.push_to_hub("alice/digits")
    assert files_of(api) >= {"config.json", "model.safetensors"}
    reloaded = AutoModelForImageClassification.from_pretrained("alice/digits", cache_dir=tmp_path / "cache").eval()
    assert torch.equal(reloaded(pixels).logits, model(pixels).logits)
    assert reloaded.hf_quantizer.encoded.keys() == model.hf_quantizer.encoded.keys()
