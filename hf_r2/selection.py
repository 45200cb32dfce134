"""The one rule for which weights are regularized, compressed and reported."""

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_r2.adapters import (
    AdaptedLayer,
    LatentLayer,
    active_copy,
    is_adapted,
    is_compression_aware,
    is_copied,
)

_OUTPUT_FIRST = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding})
_WRAPPERS = (AdaptedLayer, LatentLayer)
_COMPUTE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def select_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    min_numel: int = 0,
) -> dict[str, tuple[nn.Module, str]]:
    """Select the weights of a model that hf_r2 acts on.

    Weights of `nn.Linear`, `nn.Conv1d/2d/3d` and transformers' `Conv1D` are selected; an `nn.Embedding` only if
    `include` names it. A tied weight is selected once, under the name that its checkpoint keeps, and only if every
    module that shares it may be selected: an output layer tied to an embedding needs the embedding to be included.

    Args:
        model: any module; parametrized and meta-device weights are fine.
        include: shell patterns over parameter names (`"encoder.*.weight"`). Without them every compute layer is in.
        exclude: shell patterns over parameter names to leave out.
        min_numel: smallest number of elements that is selected.

    Returns:
        Ordered mapping of parameter name to `(module, "weight")`, in the order of `model.named_modules()`. For a layer
        with PEFT adapters, the module is an [`AdaptedLayer`], whose weight is the merged one; for one trained through
        compression (`attach`), a [`LatentLayer`], whose weight is the float parameter behind it.

    Raises:
        ValueError: if a pattern matches no weight, or if nothing is selected.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} is a list of patterns; write [{patterns!r}]")
    sharers = _sharers(model)
    candidates = [name for owners in sharers for name, _ in owners]
    for pattern in (*(include or ()), *(exclude or ())):
        require_match(pattern, candidates)

    selected = {}
    for owners in sharers:
        names = [name for name, _ in owners]
        embeddings = [name for name, module in owners if isinstance(base_layer(module), nn.Embedding)]
        if include is None:
            chosen = not embeddings
        else:
            chosen = any(matches(name, include) for name in names)
            chosen = chosen and all(matches(name, include) for name in embeddings)
        chosen = chosen and not any(matches(name, exclude or ()) for name in names)
        if chosen and owners[0][1].weight.numel() >= min_numel:
            selected[names[0]] = (owners[0][1], "weight")
    if not selected:
        raise ValueError(
            f"no weight of {type(model).__name__} is selected (include={include}, exclude={exclude}, "
            f"min_numel={min_numel}); it has {len(candidates)} candidates, for example {candidates[:3]}"
        )
    return selected


def select_trainable(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    min_numel: int = 0,
    factors: Mapping[str, float] | None = None,
) -> tuple[dict[str, tuple[nn.Module, str]], Tensor | None]:
    """Select the weights whose range training can restrict, and how strongly.

    Args:
        model: see [`select_weights`], as the other arguments.
        include: see there.
        exclude: see there.
        min_numel: see there.
        factors: factor on the strength by pattern over parameter names; the last that matches counts. 0 leaves the
            weight out; a weight that no pattern matches has 1.

    Returns:
        What [`select_weights`] does, without frozen weights and those of factor 0; and their factors, `(weights,)`, or
        None if all are 1.

    Raises:
        ValueError: if a pattern matches no weight, for a factor that is not a number ≥ 0, and if nothing is left.
    """
    selection = select_weights(model, include, exclude, min_numel)
    chosen = dict.fromkeys(selection, 1.0)
    for pattern, factor in (factors or {}).items():
        require_match(pattern, list(selection))
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(f"the strength factor {factor!r} of {pattern!r} is not a number ≥ 0")
        chosen.update({name: float(factor) for name in selection if matches(name, [pattern])})
    with torch.enable_grad():
        trainable = [
            name for name, (module, attribute) in selection.items() if getattr(module, attribute).requires_grad
        ]
    kept = [name for name in trainable if chosen[name] > 0]
    if not kept:
        reason = "have a strength factor of 0" if trainable else "are frozen (requires_grad=False)"
        raise ValueError(f"all {len(selection)} selected weights of {type(model).__name__} {reason}")
    wanted = torch.tensor([chosen[name] for name in kept], dtype=torch.float32) if factors else None
    return {name: selection[name] for name in kept}, wanted


def current_weights(selection: Mapping[str, tuple[nn.Module, str]]) -> list[Tensor]:
    """List the selected weights as they are now, output channels first."""
    return [output_first(module, held(module, attribute)) for module, attribute in selection.values()]


def held(module: nn.Module, attribute: str) -> Tensor:
    """Return a weight as its module has it now; a parameter straight from where `nn.Module` looks for it last."""
    parameter = module.__dict__.get("_parameters", {}).get(attribute)
    return getattr(module, attribute) if parameter is None else parameter


def scaled(strength: Tensor | float, factors: Tensor | None) -> Tensor | float:
    """Strength × factor, one for all weights or one per weight, `(weights,)`; factors may lie on another device."""
    if not isinstance(strength, Tensor):
        return float(strength) if factors is None else strength * factors
    return strength if factors is None else strength * factors.to(strength.device)


def output_first(module: nn.Module, weight: Tensor) -> Tensor:
    """Put the output channels of a weight first: transpose that of a transformers Conv1D. Its own inverse."""
    if type(module) in _OUTPUT_FIRST:  # most are, and it is asked at every step
        return weight
    return weight.T if isinstance(base_layer(module), Conv1D) else weight


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that a module is, under any adapters and compression-aware training."""
    return module.base_layer if isinstance(module, _WRAPPERS) else module


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a parameter name matches any shell pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def require_match(pattern: str, names: Sequence[str]) -> None:
    """Raise a ValueError with near names if a pattern matches none of the names: it is most likely a typo."""
    if not any(matches(name, [pattern]) for name in names):
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
        raise ValueError(f"pattern {pattern!r} matches no weight; near names: {near}")


def _layers(model: nn.Module, outer: str = "") -> Iterator[tuple[str, nn.Module]]:
    """List modules by name; a layer with PEFT adapters is one, and of its copies of a module the one that acts."""
    done: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in done):
            continue
        path = f"{outer}.{name}" if outer and name else outer or name
        if is_copied(module):
            done.append(f"{name}.")
            yield from _layers(active_copy(module), path)
        elif is_adapted(module):
            done.append(f"{name}.")
            yield path, AdaptedLayer(module, f"{path}.weight")
        elif is_compression_aware(module):
            done.append(f"{name}.")
            yield path, LatentLayer(module)
        else:
            yield path, module


def _sharers(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """List the weights of compute layers and embeddings, each with all (name, module) that share it.

    Sharing is seen by identity and, for transformers models, from the table of tied keys, which holds even on a
    meta-device skeleton. The first of a list is the name that checkpoints keep.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    modules = {
        f"{prefix}.weight" if prefix else "weight": module
        for prefix, module in _layers(model)
        if isinstance(base_layer(module), (*_COMPUTE_LAYERS, nn.Embedding))
    }
    shared: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules.items():
        source = modules.get(tied.get(name, name), module)
        # A parametrized weight is computed anew at every access, so its module stands for it
        key = id(source._parameters.get("weight", source))
        shared.setdefault(key, []).append((name, module))
    position = {name: index for index, name in enumerate(modules)}
    kept_first = [sorted(owners, key=lambda owner: owner[0] in tied) for owners in shared.values()]
    return sorted(kept_first, key=lambda owners: position[owners[0][0]])
