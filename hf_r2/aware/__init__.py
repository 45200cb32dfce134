"""Compression-aware training: each method a torch parametrization of the weight."""

from hf_r2.aware.activations import ActivationSettings
from hf_r2.aware.coreai import register_coreai_strategy
from hf_r2.aware.dkm import DKM, DKMOptions
from hf_r2.aware.least_squares import LeastSquares
from hf_r2.aware.rounded import Rounded

AWARE_METHODS = {"dkm": "palette", "least_squares": "least_squares"}
"""Methods, each with the codec that it trains."""

__all__ = [
    "AWARE_METHODS",
    "DKM",
    "ActivationSettings",
    "DKMOptions",
    "LeastSquares",
    "Rounded",
    "register_coreai_strategy",
]
