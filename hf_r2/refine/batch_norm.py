"""Batch-norm re-estimation: running statistics for the activations of the compressed weights."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """List the batch-norm layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BATCH_NORMS) and module.track_running_stats]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Replace the running statistics of every batch-norm layer by averages over calibration data.

    Compression shifts the mean and variance of what each layer sees, which the statistics of the float model no longer
    describe. All batches count alike; no labels are needed and no weight changes.

    Args:
        model: model with batch-norm layers; changed in place (but not if a batch fails), left in evaluation mode.
        batches: keyword arguments of the model, one mapping per batch of at least two examples.

    Raises:
        ValueError: if the model has no such layer, or if there are no batches.
    """
    layers = batch_norms(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch-norm layer; remove 'batch_norm' from refine")
    device = next(model.parameters()).device
    momenta = [layer.momentum for layer in layers]
    former = [copy.deepcopy(layer.state_dict()) for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for a plain average over all batches
        layer.train()
    count = 0
    try:
        for batch in tqdm(batches, desc="Re-estimating batch norm", unit="batch"):
            model(**{key: value.to(device) for key, value in batch.items()})
            count += 1
        if count == 0:
            raise ValueError(
                "batch-norm re-estimation needs calibration data; give some or remove 'batch_norm' from refine"
            )
    except BaseException:
        for layer, state in zip(layers, former, strict=True):
            layer.load_state_dict(state)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
