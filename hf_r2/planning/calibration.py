"""A model whose weights can be compressed one by one, and what that costs on calibration data."""

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


class Measured(NamedTuple):
    """What a compressed model loses on calibration data.

    Args:
        kl: mean KL(float ‖ compressed) in nats.
        recovery: accuracy over that of the float model; None without labels, or where the float model has none right.
    """

    kl: float
    recovery: float | None


class CalibratedModel:
    """A float model beside its checkpoint, and calibration data.

    Args:
        source: directory or Hub name of the float checkpoint.
        checkpoint: the same, for its float weights.
        batches: keyword arguments of the model, whose output has logits `(…, classes)`, which are kept for all of them;
            with `labels`, class indices of rows, if recovery is to be measured.

    Raises:
        ValueError: if there are no batches, or the model has no logits.
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
        self._reference: list[Tensor] = []
        right = []
        for batch, labels in zip(self._batches, self._labels, strict=True):
            logits = self._logits(batch)
            self._reference.append(logits.float().log_softmax(dim=-1))
            right.append(_right(logits, labels))
        self._float_right = None if None in right else sum(right)

    @property
    def labelled(self) -> bool:
        """Whether recovery can be measured."""
        return bool(self._float_right)

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
        divergences, rows, right = 0.0, 0, 0
        for batch, labels, reference in zip(self._batches, self._labels, self._reference, strict=True):
            logits = self._logits(batch)
            divergences += divergence(logits, reference).item()
            rows += reference.shape[:-1].numel()
            right += _right(logits, labels) or 0
        return Measured(divergences / rows, right / self._float_right if self._float_right else None)

    @torch.no_grad()
    def _put(self, name: str, weight: Tensor, settings: CodecSettings | None) -> Tensor:
        module, attribute = self._places[name]
        decoded = weight if settings is None else decode(encode(weight, settings, name))
        getattr(module, attribute).data.copy_(output_first(module, decoded))
        self._settings[name] = settings
        return decoded

    @torch.no_grad()
    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        output = self._model(**batch)
        if getattr(output, "logits", None) is None:
            raise ValueError(f"{type(self._model).__name__} has no logits to compare: plan without data")
        return output.logits


def _right(logits: Tensor, labels: Tensor | None) -> int | None:
    """Count right predictions of a classifier of rows; None for other models and without classes."""
    if labels is None or logits.dim() != 2 or labels.shape != logits.shape[:-1]:
        return None
    return int((logits.argmax(dim=-1) == labels).sum())
