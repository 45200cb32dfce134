"""A model whose weights can be compressed one by one, and what that costs on calibration data."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.planning.sensitivity import diagonal_fisher, divergence
from hf_r2.planning.source import FloatCheckpoint
from hf_r2.quantization.quantizer import load_float_model
from hf_r2.selection import output_first, select_weights

STANDARD_ERRORS = 2
"""By how many standard errors a loss has to be lower to count as lower, beyond what an example or two may do."""


class Measured(NamedTuple):
    """What a compressed model loses on calibration data.

    Args:
        kl: mean KL(float ‖ compressed) in nats.
        losses: of every example in nats, float64 `(examples,)`: the cross-entropy of its label or, of other models than
            classifiers of rows and without labels, KL(float ‖ compressed).
        accuracy: share of right classes; None without labels.
        recovery: accuracy over that of the float model; None without labels, or where the float model has none right.
    """

    kl: float
    losses: Tensor
    accuracy: float | None
    recovery: float | None

    @property
    def cross_entropy(self) -> float | None:
        """Mean cross-entropy of the labels in nats; None without labels."""
        return None if self.accuracy is None else self.losses.mean().item()

    def excess(self, other: "Measured") -> tuple[float, float]:
        """Return by how much the mean loss exceeds that of another on the same examples, and its standard error.

        The error is that of the mean of the examples' differences, into which what both have in common does not enter;
        infinite for a single example.
        """
        differences = self.losses - other.losses
        count = len(differences)
        return differences.mean().item(), differences.std().item() / math.sqrt(count) if count > 1 else math.inf

    def surely_better(self, other: "Measured") -> bool:
        """Whether the mean loss is lower than that of another by more than `STANDARD_ERRORS`."""
        mean, error = self.excess(other)
        return mean + STANDARD_ERRORS * error < 0


class CalibratedModel:
    """A float model beside its checkpoint, and calibration data.

    Args:
        source: directory or Hub name of the float checkpoint.
        checkpoint: the same, for its float weights.
        batches: keyword arguments of the model, whose output has logits `(…, classes)`, which are kept for all of them;
            with `labels`, class indices of rows, if cross-entropy and recovery are to be measured.

    Raises:
        ValueError: if there are no batches, the model has no logits, or labels are none of its classes.
    """

    def __init__(self, source: str, checkpoint: FloatCheckpoint, batches: Iterable[Mapping[str, Tensor]]) -> None:
        model = load_float_model(source)
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._checkpoint = checkpoint
        selection = select_weights(model, include=["*"])
        self._places: dict[str, tuple[nn.Module, str]] = {name: selection[name] for name in checkpoint.weights}
        self._settings: dict[str, CodecSettings | None] = dict.fromkeys(checkpoint.weights)
        self._batches: list[dict[str, Any]] = []
        self._labels: list[Tensor | None] = []
        for batch in batches:
            inputs = {key: value.to(self._model.device) for key, value in batch.items()}
            self._labels.append(inputs.pop("labels", None))
            self._batches.append(inputs)
        if not self._batches:
            raise ValueError("the calibration data is empty")
        self._reference = [self._log_probabilities(batch) for batch in self._batches]
        self._classified = all(map(_are_classes, self._labels, self._reference))
        if self._classified:
            _require_known(torch.cat(self._labels), self._reference[0].shape[-1])
        self._float_accuracy = _accuracy(map(_right, self._reference, self._labels)) if self._classified else None

    @property
    def labelled(self) -> bool:
        """Whether recovery can be measured."""
        return bool(self._float_accuracy)

    def fisher(self) -> dict[str, Tensor]:
        """Estimate the diagonal of the Fisher information of the float weights, output channels first."""
        self.compress(dict.fromkeys(self._places))
        weights = {name: getattr(module, attribute) for name, (module, attribute) in self._places.items()}
        found = diagonal_fisher(self._model, weights, self._batches)
        return {name: output_first(self._places[name][0], fisher) for name, fisher in found.items()}

    @torch.no_grad()
    def compress(self, settings: Mapping[str, CodecSettings | None]) -> None:
        """Compress weights as given, where they are not so yet; None restores the float weight."""
        for name, wanted in settings.items():
            if self._settings[name] != wanted:
                self._put(name, self._checkpoint.weights[name].read(), wanted)

    @contextmanager
    def changed(self, name: str, settings: CodecSettings, weight: Tensor) -> Iterator[Tensor]:
        """Compress one weight for the time of a block, and yield it decoded.

        Args:
            name: of the weight.
            settings: how it is compressed.
            weight: the float weight, output channels first.
        """
        before, former = self._settings[name], getattr(*self._places[name]).detach().clone()
        try:
            yield self._put(name, weight, settings)
        finally:
            getattr(*self._places[name]).data.copy_(former)
            self._settings[name] = before

    def measure(self) -> Measured:
        """Measure the model as it is now."""
        divergences, entropies, right = [], [], []
        for batch, labels, reference in zip(self._batches, self._labels, self._reference, strict=True):
            ours = self._log_probabilities(batch)
            divergences.append(divergence(ours, reference))
            if self._classified:
                entropies.append(nn.functional.nll_loss(ours.double(), labels, reduction="none"))
                right.append(_right(ours, labels))
        kl = torch.cat([own.flatten() for own in divergences]).mean().item()
        if not self._classified:
            return Measured(kl, torch.cat([own.view(len(own), -1).mean(dim=1) for own in divergences]), None, None)
        accuracy = _accuracy(right)
        recovery = accuracy / self._float_accuracy if self._float_accuracy else None
        return Measured(kl, torch.cat(entropies), accuracy, recovery)

    @torch.no_grad()
    def _put(self, name: str, weight: Tensor, settings: CodecSettings | None) -> Tensor:
        module, attribute = self._places[name]
        decoded = weight if settings is None else decode(encode(weight, settings, name))
        getattr(module, attribute).data.copy_(output_first(module, decoded))
        self._settings[name] = settings
        return decoded

    @torch.no_grad()
    def _log_probabilities(self, batch: Mapping[str, Tensor]) -> Tensor:
        output = self._model(**batch)
        if getattr(output, "logits", None) is None:
            raise ValueError(f"{type(self._model).__name__} has no logits to compare: plan without data")
        return output.logits.float().log_softmax(dim=-1)


def _are_classes(labels: Tensor | None, logits: Tensor) -> bool:
    """Whether labels are the classes of rows; those of tokens are not, nor are the targets of a regression."""
    if labels is None or labels.is_floating_point():
        return False
    return logits.dim() == 2 and labels.shape == logits.shape[:-1]


def _require_known(labels: Tensor, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"the model has the classes 0 to {classes - 1}, the labels are {labels.min()} to {labels.max()}: take data "
            "that it was trained for, or leave labels out"
        )


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == labels


def _accuracy(right: Iterable[Tensor]) -> float:
    return torch.cat(list(right)).double().mean().item()
