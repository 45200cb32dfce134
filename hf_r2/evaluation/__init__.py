"""Metrics and evaluation."""

from hf_r2.evaluation.classification import evaluate_classifier
from hf_r2.evaluation.metrics import Accuracy

__all__ = ["Accuracy", "evaluate_classifier"]
