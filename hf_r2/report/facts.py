"""What the manifest says about a compressed weight."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hf_r2.codecs import Encoded, decode
from hf_r2.codecs.encoded import bands
from hf_r2.codecs.error import decibels, energies
from hf_r2.report.statistics import moments, tensor_statistics


def weight_facts(name: str, weight: Tensor, shape: Sequence[int], encoded: Encoded) -> dict[str, Any]:
    """Return a weight's statistics, how it was compressed, and what of it is left.

    Args:
        name: parameter name.
        weight: the float weight, output channels first.
        shape: shape of the parameter.
        encoded: the compressed weight.
    """
    signal = noise = 0.0
    start = 0
    for band in bands(encoded):
        decoded = decode(band)
        energy = energies(weight[start : start + len(decoded)], decoded)
        signal, noise, start = signal + energy[0], noise + energy[1], start + len(decoded)
    return {
        **asdict(tensor_statistics(name, weight, shape)),
        "codec": encoded.settings.to_dict(),
        "bits_per_weight": encoded.bits_per_weight,
        "mse": noise / weight.numel(),
        "compressed_sqnr": decibels(signal, noise),
        "compressed": moments(encoded),
    }
