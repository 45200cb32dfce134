"""Metrics and evaluation."""

from hf_r2.evaluation.checkpoint import evaluate_checkpoint
from hf_r2.evaluation.classification import evaluate_classifier
from hf_r2.evaluation.data import LabelledData
from hf_r2.evaluation.language_modeling import evaluate_language_model
from hf_r2.evaluation.metrics import Accuracy, Perplexity

__all__ = [
    "Accuracy",
    "LabelledData",
    "Perplexity",
    "evaluate_checkpoint",
    "evaluate_classifier",
    "evaluate_language_model",
]
