"""What layers see of calibration data, one layer at a time, so that memory holds one layer's activations."""

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_r2.refine.matrices import output_rows

Batches = Collection[Mapping[str, Any]]
"""Keyword arguments of a model, one mapping per batch; can be walked through again and again."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)


class _Reached(Exception):
    """The layer that was waited for has run."""


@dataclass
class Trace:
    """How one forward pass goes through some layers.

    Attributes:
        calls: how often each layer ran, by name, in the order of their first runs.
        following: for each layer the batch norm and the ReLU that take its very output, one after another; either may
            be missing.
    """

    calls: dict[str, int] = field(default_factory=dict)
    following: dict[str, list[nn.Module]] = field(default_factory=dict)

    def norm(self, name: str) -> nn.Module | None:
        """Return the batch norm behind a layer, if there is one."""
        return next((module for module in self.following[name] if isinstance(module, _NORMS)), None)


@torch.no_grad()
def trace(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> Trace:
    """Run one example through a model, and note its layers.

    Args:
        model: in evaluation mode afterwards.
        layers: by name.
        batches: of which the first is cut to its first example.

    Raises:
        ValueError: if there are no batches.
    """
    found = Trace()
    owners: dict[int, tuple[weakref.ref, int, str]] = {}

    def take(inputs: tuple) -> str | None:
        """Name the layer whose output the input of a module is, unless it was changed in place since."""
        if not inputs or not isinstance(inputs[0], Tensor):
            return None
        reference, version, name = owners.get(id(inputs[0]), (lambda: None, 0, ""))
        return name if reference() is inputs[0] and inputs[0]._version == version else None

    def mark(output: Tensor, name: str) -> None:
        owners[id(output)] = (weakref.ref(output), output._version, name)

    def note_layer(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            found.calls[name] = found.calls.get(name, 0) + 1
            found.following.setdefault(name, [])
            mark(output, name)

        return hook

    def note_following(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        name = take(inputs)
        if name is None:
            return
        chain = found.following[name]
        # A norm right behind the layer only, and nothing behind the activation
        if not chain or (isinstance(chain[-1], _NORMS) and isinstance(module, _ACTIVATIONS)):
            chain.append(module)
            mark(output, name)

    handles = [layer.register_forward_hook(note_layer(name)) for name, layer in layers.items()]
    handles += [
        module.register_forward_hook(note_following)
        for module in model.modules()
        if isinstance(module, (*_NORMS, *_ACTIVATIONS))
    ]
    try:
        for batch in batches:
            model.eval()(**_on_device(model, {key: value[:1] for key, value in batch.items()}))
            return found
    finally:
        _remove(handles)
    raise ValueError("the calibration data is empty: give some batches, or leave the step out of refine")


@torch.no_grad()
def run_to(model: nn.Module, layer: nn.Module, calls: int, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Run a batch up to a layer, and return its inputs and outputs at every one of its calls.

    Args:
        model: in evaluation mode.
        layer: of the model.
        calls: how often it runs; the model is left after the last one.
        batch: keyword arguments of the model.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.append((inputs[0].clone(), output.clone()) if calls > 1 else (inputs[0], output))
        if len(seen) == calls:
            raise _Reached

    handle = layer.register_forward_hook(hook)
    try:
        model(**_on_device(model, batch))
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def output_means(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
    """Average the outputs of layers over all positions of all batches, in float64: `(out,)` by name.

    Args:
        model: in evaluation mode.
        layers: matrix layers by name; those that do not run are left out.
        batches: all positions count alike, padding tokens too.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            rows = output_rows(layer, output)
            sums[name] = sums.get(name, 0) + rows.sum(dim=0, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = [layer.register_forward_hook(add(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            model(**_on_device(model, batch))
    finally:
        _remove(handles)
    return {name: total / counts[name] for name, total in sums.items()}


def follow(modules: list[nn.Module], outputs: Tensor) -> Tensor:
    """Put rows of a layer's outputs `(rows, out)` through what follows it: a batch norm, in evaluation, and a ReLU."""
    for module in modules:
        if isinstance(module, _NORMS):
            statistics = (module.running_mean, module.running_var, module.weight, module.bias)
            detached = (None if tensor is None else tensor.detach().to(outputs.dtype) for tensor in statistics)
            outputs = nn.functional.batch_norm(outputs, *detached, eps=module.eps)
        else:
            outputs = module(outputs)
    return outputs


def _on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
