"""Tiny models, data and oracles that the training tests share."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from hf_r2 import R2Mixin, R2Trainer, R2TrainingArguments

PLAIN = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


class FixedNormResNetForImageClassification(ResNetForImageClassification):
    """A ResNet whose batch norms always use their running statistics, so that images do not depend on each other."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def make_resnet(cls=ResNetForImageClassification):
    torch.manual_seed(1)
    return cls(
        ResNetConfig(
            num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


def make_fixed_norm_resnet():
    return make_resnet(FixedNormResNetForImageClassification)


def make_bert():
    return _bert(dropout=0.0)


def make_dropout_bert():
    return _bert(dropout=0.3)


def _bert(dropout):
    torch.manual_seed(2)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
    )


def make_llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def make_gpt2():
    torch.manual_seed(4)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


MODELS = {
    "resnet": make_resnet,
    "fixed_norm_resnet": make_fixed_norm_resnet,
    "bert": make_bert,
    "dropout_bert": make_dropout_bert,
    "llama": make_llama,
    "gpt2": make_gpt2,
}


def make_data(name, count):
    """Learnable examples for a model of `MODELS`: the class shifts the pixels or the tokens."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for index in range(count):
        label = index % 3
        if "resnet" in name:
            pixels = torch.randn(3, 16, 16, generator=generator) + 0.5 * label
            examples.append({"pixel_values": pixels, "labels": label})
        else:
            tokens = (torch.randint(0, 16, (8,), generator=generator) + 5 * label) % 32
            examples.append({"input_ids": tokens, "labels": label if "bert" in name else tokens})
    return examples


def make_trainer(model, data, output_dir, trainer_class=R2Trainer, trainer_kwargs=None, **arguments):
    """Build a trainer with this module's plain arguments, changed and extended by those given."""
    arguments_class = R2TrainingArguments if issubclass(trainer_class, R2Mixin) else TrainingArguments
    args = arguments_class(output_dir=str(output_dir), **{**PLAIN, **arguments})
    return trainer_class(model=model, args=args, train_dataset=data, **(trainer_kwargs or {}))


def train_logs(trainer):
    """The trainer's logs of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, key="loss"):
    return [entry[key] for entry in train_logs(trainer)]


def snapshot(model):
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(actual, expected):
    """Bit-equal dicts of tensors."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual, expected, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


def regularized_weights(model):
    """Weights of compute layers by name, found without hf_r2; a weight tied to an embedding is none."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, Conv1D)) and id(module.weight) not in embeddings
    }


def l_inf_sum(model):
    return sum(weight.abs().max().item() for weight in regularized_weights(model).values())


def l_inf_subgradient(model):
    """The sign of the largest element of each regularized weight, zero everywhere else."""
    gradients = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, weight in regularized_weights(model).items():
        largest = weight.abs().flatten().argmax()
        gradients[name].view(-1)[largest] = weight.flatten()[largest].sign()
    return gradients


class ZeroTaskTrainer(Trainer):
    """A trainer whose task loss is always zero."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return (0 * loss, outputs) if return_outputs else 0 * loss


class R2ZeroTaskTrainer(R2Mixin, ZeroTaskTrainer):
    """Range regularization and nothing else."""
