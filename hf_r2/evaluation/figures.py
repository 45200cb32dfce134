"""What evaluation reports of predicted classes."""

import math

import torch
from torch import Tensor

from hf_r2.evaluation.fidelity import Fidelity
from hf_r2.evaluation.metrics import Accuracy


class ClassFigures:
    """Collects class predictions, batch by batch, of a model and of the float model that it was compressed from."""

    def __init__(self) -> None:
        self._accuracy = Accuracy()
        self._fidelity: Fidelity | None = None
        self._references: list[Tensor] = []
        self._loss = 0.0

    def add_batch(self, logits: Tensor, references: Tensor, float_logits: Tensor | None = None) -> Tensor:
        """Add a batch: logits `(batch, classes)`, class indices `(batch,)`, and the float model's logits.

        Returns:
            The cross-entropy of every example, `(batch,)`, in nats.
        """
        logits = logits.float()
        losses = torch.nn.functional.cross_entropy(logits, references, reduction="none")
        self._loss += losses.sum().item()
        self._accuracy.add_batch(predictions=logits.argmax(dim=-1).tolist(), references=references.tolist())
        self._references.append(references.cpu())
        if float_logits is not None:
            self._fidelity = self._fidelity or Fidelity()
            self._fidelity.add_batch(logits, float_logits, references)
        return losses

    def compute(self) -> dict[str, float | int | bool | None]:
        """Return the figures that [`hf_r2.evaluation.evaluate_classifier`] describes.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._references:
            raise ValueError("the evaluation data is empty")
        references = torch.cat(self._references)
        accuracy = self._accuracy.compute()["accuracy"]
        chance = references.bincount().max().item() / len(references)
        standard_error = math.sqrt(chance * (1 - chance) / len(references))
        figures = {
            "accuracy": accuracy,
            "loss": self._loss / len(references),
            "examples": len(references),
            "collapsed": accuracy <= chance + 2 * standard_error,
        }
        if self._fidelity is not None:
            compared = self._fidelity.compute()
            recovery = accuracy / compared["float_accuracy"] if compared["float_accuracy"] else None
            figures |= {"recovery": recovery, **compared}
        return figures
