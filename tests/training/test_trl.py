"""The mixin on a trainer that is not Trainer: TRL's SFTTrainer."""

from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import MODELS, PLAIN, l_inf_sum, logged, regularized_weights, snapshot
from transformers import PreTrainedTokenizerFast

from hf_r2 import R2Mixin, R2TrainingArguments

pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
WORDS = list("abcdefghijklmnopqrstuvwxyz")


@dataclass
class R2SFTConfig(R2TrainingArguments, SFTConfig):
    pass


class R2SFTTrainer(R2Mixin, SFTTrainer):
    pass


def make_tokenizer():
    words = ["<pad>", "<unk>", "<eos>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=16
    )


def make_texts(count=32):
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (count, 8), generator=generator).tolist()
    return Dataset.from_list([{"text": " ".join(WORDS[index] for index in pick)} for pick in picks])


def train(name, output_dir, config=R2SFTConfig, trainer=R2SFTTrainer, **options):
    settings = {**PLAIN, "optim": "adamw_torch", "learning_rate": 2e-3, "num_train_epochs": 3, "bf16": False}
    args = config(output_dir=str(output_dir), max_length=16, **{**settings, **options})
    made = trainer(model=MODELS[name](), args=args, train_dataset=make_texts(), processing_class=make_tokenizer())
    made.train()
    return made


def crest(model):
    crests = [weight.abs().max() / weight.square().mean().sqrt() for weight in regularized_weights(model).values()]
    return torch.stack(crests).mean().item()


def test_arguments_of_both_classes_are_kept(tmp_path):
    args = R2SFTConfig(output_dir=str(tmp_path), max_length=7, packing=False, r2_mode="clip", r2_clip=1.3, use_cpu=True)
    assert (args.max_length, args.packing, args.r2_mode, args.r2_clip) == (7, False, "clip", 1.3)
    with pytest.raises(ValueError, match="r2_clip"):
        R2SFTConfig(output_dir=str(tmp_path), r2_clip=0.5, use_cpu=True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_range_loss_is_added_logged_and_lowers_the_crest_factor(tmp_path, name, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.05}
    plain = train(name, tmp_path / "plain", SFTConfig, SFTTrainer, **options)
    ours = train(name, tmp_path / "ours", r2_strength=0.1, **options)
    assert logged(ours, "r2_loss")[0] == pytest.approx(0.1 * l_inf_sum(MODELS[name]()), rel=1e-4)
    assert logged(ours, "task_loss")[0] == pytest.approx(logged(plain)[0], abs=1e-4)
    assert logged(ours, "crest_factor")[-1] == pytest.approx(crest(ours.model), rel=1e-4)
    assert crest(ours.model) < 0.95 * crest(plain.model)


@pytest.mark.parametrize(
    "options", [{"r2_mode": "clip", "r2_clip": 1.3}, {"r2_mode": "prox", "r2_strength": 20.0}], ids=str
)
def test_projections_restrict_under_adam(tmp_path, options):
    plain = train("llama", tmp_path / "plain", SFTConfig, SFTTrainer)
    ours = train("llama", tmp_path / "ours", **options)
    assert crest(ours.model) < 0.8 * crest(plain.model)
    assert logged(ours)[-1] < logged(ours)[0]


def test_without_restriction_it_is_the_plain_trainer_bit_for_bit(tmp_path):
    plain = train("llama", tmp_path / "plain", SFTConfig, SFTTrainer)
    ours = train("llama", tmp_path / "ours", r2_mode="none")
    assert all(map(torch.equal, snapshot(ours.model).values(), snapshot(plain.model).values()))
    assert not any(key.startswith(("r2_", "crest", "kurtosis")) for log in ours.state.log_history for key in log)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_a_teacher_is_refused_where_the_loss_is_fused_with_the_head(tmp_path):
    with pytest.raises(ValueError, match=r"carry no gradient to distil by .*: use R2Trainer"):
        train("llama", tmp_path, r2_mode="none", r2_teacher="start")
