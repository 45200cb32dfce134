"""Metrics and evaluation."""

from hf_r2.evaluation.checkpoint import evaluate_checkpoint
from hf_r2.evaluation.classification import evaluate_classifier
from hf_r2.evaluation.data import LabelledData
from hf_r2.evaluation.metrics import Accuracy

__all__ = ["Accuracy", "LabelledData", "evaluate_checkpoint", "evaluate_classifier"]
