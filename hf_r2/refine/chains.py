"""Chains of convolutions with nothing but batch norm and ReLU between them, in the architectures that are known.

Only there can a channel be scaled or shifted in one layer and back in the next (Nagel et al., arXiv 1906.04721). The
table names blocks of transformers' ResNet, MobileNetV1 and MobileNetV2, all of whose units have a `convolution`, a
`normalization` and an `activation`. Chains end where an output is used twice (residual connections), where a
convolution has no ReLU behind it, and before the classifier.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

_CHAINS: dict[str, Callable[[nn.Module], list[nn.Module | None]]] = {
    "ResNetBasicLayer": lambda block: list(block.layer),
    "ResNetBottleNeckLayer": lambda block: list(block.layer),
    "MobileNetV1Model": lambda model: [model.conv_stem, *model.layer],
    "MobileNetV2Stem": lambda stem: [stem.first_conv, stem.expand_1x1, stem.conv_3x3, stem.reduce_1x1],
    "MobileNetV2InvertedResidual": lambda block: [block.expand_1x1, block.conv_3x3, block.reduce_1x1],
}


def chains(model: nn.Module) -> list[list[nn.Module]]:
    """List the chains of a model, each its units in order of computation; empty for an unknown architecture."""
    found = [_CHAINS[type(module).__name__](module) for module in model.modules() if type(module).__name__ in _CHAINS]
    return [[unit for unit in chain if unit is not None] for chain in found]


def require_chains(model: PreTrainedModel, step: str) -> list[list[nn.Module]]:
    """List the chains of a model, with ReLU between all units: ReLU6 is replaced, as [`replace_relu6`] says.

    Raises:
        ValueError: if there are none, or another activation is between.
    """
    found = chains(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers that are known to scale: {step!r} is for ResNet, MobileNetV1 and "
            "MobileNetV2; remove it from refine"
        )
    replace_relu6(model)
    for unit in (unit for chain in found for unit in chain[:-1]):
        if not isinstance(unit.activation, nn.ReLU):
            raise ValueError(
                f"{step!r} needs ReLU between layers, not {type(unit.activation).__name__}; remove it from refine"
            )
    return found


def pairs(found: list[list[nn.Module]]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Walk over the neighbours in chains: a unit and the one that alone takes its output."""
    for chain in found:
        yield from pairwise(chain)


def units(model: nn.Module) -> list[nn.Module]:
    """List all units of a convolution and a batch norm behind it, in chains or not."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "convolution", None), nn.Conv2d)
        and isinstance(getattr(module, "normalization", None), nn.BatchNorm2d)
    ]


def replace_relu6(model: PreTrainedModel) -> None:
    """Put ReLU in the place of every ReLU6, in the modules and in the config (Nagel et al., section 5.1.1).

    ReLU6 does not commute with the scaling of channels. The model computes the same wherever no activation is above 6.

    Raises:
        ValueError: if the config cannot carry the change.
    """
    holders = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ReLU6)
    ]
    if holders and getattr(model.config, "hidden_act", None) != "relu6":
        raise ValueError("the model has ReLU6 which its config does not name in hidden_act: it would not be reloaded")
    for module, name in holders:
        setattr(module, name, nn.ReLU())
    if holders:
        model.config.hidden_act = "relu"
