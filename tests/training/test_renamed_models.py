"""Resuming models that transformers saves under other names than they have, or with their tensors cut otherwise."""

import pytest
import torch
from safetensors.torch import load_file
from training_cases import assert_same, snapshot
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}


def make_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def make_mixture():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=16, head_dim=4, **sizes, **experts))


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3} for index in range(32)]


def sequences():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(16, (6,), generator=generator) for _ in range(32)]
    return [{"input_ids": sequence, "labels": sequence} for sequence in tokens]


MODELS = {"vit": (make_vit, images), "mixture of experts": (make_mixture, sequences)}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_resumed_training_is_the_straight_one_bit_for_bit(train, make_trainer, name):
    make, data = MODELS[name]
    straight = train(make(), data(), **SETTINGS)
    resumed = make_trainer(make(), data(), **SETTINGS)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-2")
    assert_same(snapshot(resumed.model), snapshot(straight.model))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_checkpoints_in_training_and_the_saved_model_load_alike(train, tmp_path, name):
    make, data = MODELS[name]
    trained = train(make(), data(), **SETTINGS)
    trained.model.save_pretrained(tmp_path)
    for directory in (f"{trained.args.output_dir}/checkpoint-4", tmp_path):
        assert_same(snapshot(type(trained.model).from_pretrained(directory)), snapshot(trained.model))


def test_a_checkpoint_that_lacks_weights_is_refused(make_trainer, tmp_path):
    """What Trainer saves of this model holds other names, and it would go on from random weights with a warning."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **SETTINGS)
    stock = Trainer(make_vit(), arguments, train_dataset=images())
    stock.train()
    if load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys() == stock.model.state_dict().keys():
        pytest.skip("this transformers saves ViT under the names that it has")
    with pytest.raises(ValueError, match="resume from a checkpoint of this model, saved by R2Trainer"):
        make_trainer(make_vit(), images(), **SETTINGS).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
