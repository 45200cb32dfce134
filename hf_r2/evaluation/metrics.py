"""Metrics of the `evaluate` library that need no network."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference.

    `evaluate.load("accuracy")` fetches a script from the Hub; this class is the same metric without the network.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of integer class labels",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Perplexity(evaluate.Metric):
    """Exponential of the mean negative log-likelihood of tokens.

    The metric of that name on the Hub takes texts and loads a model of its own; this one takes what the model at hand
    gives to every token.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exponential of the mean negative log-likelihood of tokens.",
            citation="",
            inputs_description="predictions: list of negative log-likelihoods in nats, one a token",
            features=datasets.Features({"predictions": datasets.Value("float32")}),
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.mean(np.asarray(predictions, dtype=np.float64))))}
