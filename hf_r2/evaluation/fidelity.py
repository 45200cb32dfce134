"""How close a compressed model is to its float model."""

import torch
from torch import Tensor


class Fidelity:
    """Compares class probabilities of a compressed model with those of its float model, batch by batch."""

    def __init__(self) -> None:
        self._examples = 0
        self._agreeing = 0
        self._right = 0
        self._divergence = 0.0

    def add_batch(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Add a batch: logits of both models, `(batch, classes)`, and class indices, `(batch,)`."""
        ours, theirs = logits.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
        self._examples += len(labels)
        self._agreeing += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        self._right += int((theirs.argmax(dim=-1) == labels).sum())
        self._divergence += torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()

    def compute(self) -> dict[str, float]:
        """Return the figures.

        Returns:
            `agreement`, the share of examples for which both predict the same class (0–1); `kl`, the mean
            KL(float ‖ compressed) of the class probabilities in nats; and `float_accuracy`, the float model's own.
        """
        return {
            "agreement": self._agreeing / self._examples,
            "kl": self._divergence / self._examples,
            "float_accuracy": self._right / self._examples,
        }
