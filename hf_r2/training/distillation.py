"""Knowledge distillation: a frozen teacher's class probabilities beside the task loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

IGNORED = -100
"""The label of items that no loss counts."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T²·KL(p ‖ q) of every item, with p = softmax(teacher / T) and q = softmax(student / T).

    Hinton et al., arXiv 1503.02531: T² keeps the size of the gradient when T changes. Pouransari et al., arXiv
    2001.02786, train low-bit models with T = 1 and no other loss. The gradient with respect to the student is
    T·(q − p), which is exactly zero for a student that is its teacher.

    Args:
        student: `(…, classes)` logits, any float dtype.
        teacher: logits of the same shape.
        temperature: T > 0.

    Returns:
        `(…)`, in nats × T², in float32 or better.
    """
    student, teacher = _centred(student, temperature), _centred(teacher, temperature)
    student_norm, teacher_norm = (logits.logsumexp(-1, keepdim=True) for logits in (student, teacher))
    # log(p / q) in two parts: log_softmax would weight the student's norm by Σp, which rounds to other than 1
    difference = ((teacher - teacher_norm).exp() * (teacher - student)).sum(-1)
    return temperature**2 * (difference + (student_norm - teacher_norm).squeeze(-1))


def _centred(logits: Tensor, temperature: float) -> Tensor:
    """Scale logits and shift each item's largest to 0, so that no large numbers cancel later."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits - logits.detach().amax(-1, keepdim=True)


def scores_next_token(model: nn.Module) -> bool:
    """Tell whether a model's loss compares token t with label t + 1: a decoder's with the causal loss does."""
    is_causal = getattr(model, "loss_function", None) is ForCausalLMLoss
    return is_causal and not getattr(model.config, "is_encoder_decoder", False)


class Distillation:
    """Mixes the task loss of a training with the distillation loss: (1 − share)·task + share·T²·KL.

    The KL is the mean over the items that the task loss counts, those whose label is not −100.

    Args:
        teacher: frozen model that takes the student's inputs and returns logits of the same shape.
        temperature: T > 0.
        share: of the distillation loss, in (0, 1]; with 1 the task loss is only logged.
        shifted: whether token t is scored against label t + 1, as causal language models do.
    """

    def __init__(self, teacher: nn.Module, temperature: float, share: float, shifted: bool) -> None:
        self.teacher = teacher
        self.temperature = temperature
        self.share = share
        self.shifted = shifted
        self._totals: Tensor | float = 0.0
        self._steps = 0.0

    def mix(
        self,
        task_loss: Tensor,
        outputs: Any,
        batch: dict[str, Any],
        micro_batches: int,
        scaled: bool,
        items: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of a micro-batch, which weighs in its optimizer step as its task loss does.

        Args:
            task_loss: scalar.
            outputs: the student's, from the forward pass that gave the task loss.
            batch: what the student was given, labels included.
            micro_batches: number of them in this optimizer step.
            scaled: whether the micro-batches' losses add up to the step's; else their mean is the step's.
            items: number of items that the sum over this micro-batch is divided by; without, its own.

        Raises:
            ValueError: for outputs without logits or gradient, logits of another shape than the teacher's, and labels
                that are not one class per row or token.
        """
        value = self._mean(outputs, batch, items).to(task_loss.device)
        if scaled and items is None:
            value = value / micro_batches
        noted = torch.stack([task_loss.detach().float(), value.detach().float()])
        self._totals = self._totals + (noted if scaled else noted / micro_batches)
        self._steps += 1 / micro_batches
        return value if self.share == 1 else (1 - self.share) * task_loss + self.share * value

    def averages(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Average both losses over the optimizer steps since the last call; `reduce` averages over processes."""
        if not self._steps:
            return {}
        task, distillation = (reduce(self._totals) / self._steps).tolist()
        self._totals, self._steps = 0.0, 0.0
        return {"task_loss": task, "distillation_loss": distillation}

    def _mean(self, outputs: Any, batch: dict[str, Any], items: Tensor | float | None) -> Tensor:
        student = _logits(outputs, "model")
        if torch.is_grad_enabled() and not student.requires_grad:
            raise ValueError(
                "the trainer fuses the loss with the model's head, and its logits carry no gradient to distil by (TRL "
                "does): use R2Trainer, or a trainer that passes on the outputs that its loss is computed from"
            )
        counted = self._targets(student, batch).to(student.device) != IGNORED
        teacher = self._teacher_logits(batch).to(student.device)
        if teacher.shape != student.shape:
            raise ValueError(
                f"the teacher's logits have the shape {tuple(teacher.shape)}, the model's {tuple(student.shape)}: take "
                "a teacher with the same classes or vocabulary, trained for the same task"
            )
        values = distillation_loss(student, teacher, self.temperature)
        return values.masked_fill(~counted, 0).sum() / (counted.sum().clamp_min(1) if items is None else items)

    def _targets(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return labels, one for each item of the logits."""
        labels = batch.get("shift_labels", batch.get("labels"))
        if not isinstance(labels, Tensor):
            raise ValueError(f"distillation needs labels, to know which items count; the batch has {', '.join(batch)}")
        if labels.is_floating_point() or logits.ndim not in (2, 3) or labels.numel() != logits[..., 0].numel():
            raise ValueError(
                f"distillation needs one class per row or token, but labels of type {labels.dtype} and shape "
                f"{tuple(labels.shape)} meet logits of shape {tuple(logits.shape)}: train without a teacher"
            )
        labels = labels.reshape(logits.shape[:-1])
        if self.shifted and logits.ndim == 3 and "shift_labels" not in batch:
            return pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels

    @torch.no_grad()
    def _teacher_logits(self, batch: dict[str, Any]) -> Tensor:
        dtype = next(self.teacher.parameters()).dtype
        # An encoder-decoder makes the decoder's inputs of the labels; no other teacher needs them
        reads_labels = getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False)
        inputs = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
            if reads_labels or name not in ("labels", "shift_labels")
        }
        return _logits(self.teacher(**inputs), "teacher")


def _logits(outputs: Any, owner: str) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        found = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ValueError(
            f"distillation compares logits, but the {owner} returned none (only {found}): take a model with one head, "
            "with return_dict and without use_liger_kernel, which fuses the head with the loss"
        )
    return logits
