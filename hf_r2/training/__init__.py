"""Range regularization inside transformers' Trainer."""

from hf_r2.training.arguments import R2TrainingArguments
from hf_r2.training.mixin import R2Mixin
from hf_r2.training.trainer import R2Trainer

__all__ = ["R2Mixin", "R2Trainer", "R2TrainingArguments"]
