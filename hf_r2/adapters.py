"""Weights that are not where a layer usually has them: with PEFT's adapters on them, or trained through compression."""

from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_adapted(module: nn.Module) -> bool:
    """Tell whether PEFT has put an adapter on a layer: a base layer with a weight, inside a layer of PEFT's."""
    return hasattr(module, "get_base_layer") and hasattr(module, "active_adapters")


def is_copied(module: nn.Module) -> bool:
    """Tell whether PEFT keeps a module's original beside the copies that it trains (`modules_to_save`)."""
    return hasattr(module, "original_module") and hasattr(module, "modules_to_save")


def active_copy(module: nn.Module) -> nn.Module:
    """Return the copy that acts, or the original if adapters are disabled."""
    active = [] if getattr(module, "disable_adapters", False) else module.active_adapters
    copies = [module.modules_to_save[name] for name in active if name in module.modules_to_save]
    return copies[0] if copies else module.original_module


def is_compression_aware(module: nn.Module) -> bool:
    """Tell whether the weight of a layer is trained through compression (see `hf_r2.aware`)."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return any(getattr(step, "compression_aware", False) for step in module.parametrizations["weight"])


class LatentLayer(nn.Module):
    """A layer that is trained through compression, by its latent weight: the float parameter that is compressed.

    Args:
        layer: whose weight has the parametrization.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight, shape and layout of the layer's."""
        return self.base_layer.parametrizations["weight"].original


class AdaptedLayer(nn.Module):
    """A layer as it will be once its adapters are merged into it: what is compressed and served.

    Its weight is computed, base + Σ delta of the active adapters, differentiably in the adapters' parameters. The base
    is frozen, and restricting it alone would restrict nothing that trains.

    Args:
        layer: PEFT's layer.
        name: of the weight, for errors.

    Raises:
        ValueError: when the weight is read, for an adapter whose merged weight is not base + delta (DoRA, IA³ …).
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.name = name

    @property
    def base_layer(self) -> nn.Module:
        """The layer that PEFT found."""
        return self.layer.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The merged weight, shape and layout of the base layer's."""
        if not hasattr(self.layer, "get_delta_weight") or getattr(self.layer, "lora_variant", None):
            raise ValueError(
                f"the adapter on {self.name} is not one that adds to its weight (LoRA does): exclude the weight, or "
                "merge the adapter and train all weights"
            )
        merged = self.base_layer.weight
        adapters = [] if self.layer.merged or self.layer.disable_adapters else self.layer.active_adapters
        for adapter in adapters:
            if adapter in self.layer.scaling:
                merged = merged + self.layer.get_delta_weight(adapter).to(merged.dtype)
        return merged
