"""What compresses a float model: the codecs and methods of this package, and other libraries."""

from typing import Any

import peers
from examples import Examples
from loop import steps
from results import Cell
from torch import nn

from hf_r2 import R2QuantizationConfig, attach, finalize
from hf_r2.quantization import compress


def compressed(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    """Compress a float model as a cell says, in place where that is possible.

    Returns:
        The compressed model, and the bytes of its compressed weights with their scales and tables.
    """
    settings = spec["compression"]
    if "peer" in settings:
        return peers.compressed(model, spec, train)
    config = quantization(spec)
    if config.aware is None:
        model = compress(model, config)
    else:
        attach(model, config)
        for _ in steps(model, settings["training"], spec["seed"], train):
            pass
        model = finalize(model)
    return model, sum(encoded.nbytes for encoded in model.hf_quantizer.encoded.values())


def quantization(spec: Cell) -> R2QuantizationConfig:
    """Make the config of a cell. The first and the last layer keep 8 bits, uniform ones whatever the codec."""
    outer: dict[str, Any] = {"method": "uniform", "bits": 8, "grain": spec["grain"]}
    options = {key: value for key, value in spec["compression"].items() if key != "training"}
    return R2QuantizationConfig(
        **{"grain": spec["grain"], **options}, overrides=dict.fromkeys(spec["first_and_last"], outer)
    )
