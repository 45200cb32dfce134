"""The plain training loop in which the studies train through compression, their own and that of other libraries."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from examples import Examples
from torch import nn
from torch.optim import Optimizer

from hf_r2.training.distillation import distillation_loss


def steps(
    model: nn.Module,
    settings: dict[str, Any],
    seed: int,
    train: Examples,
    teacher: nn.Module | None = None,
    groups: list[dict[str, Any]] | None = None,
    wrap: Callable[[Optimizer], Optimizer] = lambda optimizer: optimizer,
) -> Iterator[int]:
    """Train, by the labels or from a teacher, in batches drawn from the seed alone; yield after each step.

    Args:
        model: trained in place.
        settings: steps, batch, learning_rate and weight_decay; with a momentum the optimizer is SGD, else AdamW.
        seed: what the batches are drawn from.
        train: what they are drawn of.
        teacher: whose outputs are learned in place of the labels.
        groups: parameter groups of the optimizer; all parameters in one by default.
        wrap: makes the optimizer that takes the steps of the plain one.
    """
    count = settings["steps"]
    base = _optimizer(groups or [{"params": list(model.parameters())}], settings)
    optimizer = wrap(base)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 0.5 * (1 + math.cos(math.pi * step / count)))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(count):
        chosen = torch.randint(len(train), (settings["batch"],), generator=generator)
        batch = {name: tensor[chosen] for name, tensor in train.tensors.items()}
        output = model(**batch)
        if teacher is None:
            loss = output.loss
        else:
            with torch.no_grad():
                taught = teacher(pixel_values=batch["pixel_values"]).logits
            loss = distillation_loss(output.logits, taught).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


def _optimizer(groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    options = {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}
    if "momentum" in settings:
        return torch.optim.SGD(groups, momentum=settings["momentum"], **options)
    return torch.optim.AdamW(groups, **options)
