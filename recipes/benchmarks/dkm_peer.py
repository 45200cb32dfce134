"""The peer of the DKM benchmark: coremltools' DKMPalettizer, prepared and trained as its users do."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

FORCED = {"palett_epsilon": -1.0}
"""No two inertias are less than −1 apart, so no iteration is the last one early."""


def palettize(
    model: nn.Module,
    start: Callable[[Tensor, int], Tensor],
    bits: int,
    dim: int = 1,
    rows: int | None = None,
    **options: Any,
) -> Any:
    """Prepare a model in place.

    Args:
        model: its Linear and Conv2d layers below the root are palettized, small ones too, as ours are.
        start: gives the centroids `(groups, 2^bits, dim)` to begin with, for a weight and a number of groups. The
            k-means++ of coremltools would take up to minutes.
        bits: of a code.
        dim: dimensions of a centroid.
        rows: how many output channels share a look-up table; None for all.
        **options: of `ModuleDKMPalettizerConfig`.

    Returns:
        The palettizer, whose `step()` belongs after the optimizer's.
    """
    # Imported here, because only one of the processes needs it; it warns of a torch that it was not tested with
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig, ModuleDKMPalettizerConfig

    grouping = {} if rows is None else {"granularity": "per_grouped_channel", "group_size": rows}
    settings = ModuleDKMPalettizerConfig(n_bits=bits, cluster_dim=dim, weight_threshold=0, **grouping, **options)
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(global_config=settings))
    palettizer.prepare(inplace=True)
    for module in palettized(model):
        fake = module.weight_fake_quant
        fake.create_partitions(module.weight.detach())
        fake.centroids = [table.clone() for table in start(module.weight.detach(), len(fake.partitions))]
    return palettizer


def palettized(model: nn.Module) -> list[nn.Module]:
    """List the modules whose weight is palettized."""
    return [module for module in model.modules() if hasattr(module, "weight_fake_quant")]
