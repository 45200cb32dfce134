"""Compression-aware training: each method a torch parametrization of the weight."""

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.coreai import register_coreai_strategy
from hf_r2.aware.dkm import DKM, DKMOptions
from hf_r2.aware.dorefa import DoReFa
from hf_r2.aware.ewgs import EWGS, EWGSOptions
from hf_r2.aware.least_squares import LeastSquares
from hf_r2.aware.lsq import LSQ
from hf_r2.aware.rounded import Rounded

AWARE_METHODS = {
    "dkm": "palette",
    "least_squares": "least_squares",
    "lsq": "uniform",
    "ewgs": "uniform",
    "dorefa": "uniform",
    "pact": "uniform",
}
"""Methods, each with the codec that it trains."""

PARAMETRIZATIONS: dict[str, type[Rounded]] = {
    "dkm": DKM,
    "least_squares": LeastSquares,
    "lsq": LSQ,
    "ewgs": EWGS,
    "dorefa": DoReFa,
    "pact": DoReFa,  # its own part is the clips of inputs
}
"""Methods, each with its parametrization of the weight."""

AWARE_OPTIONS: dict[str, type[DKMOptions | EWGSOptions]] = {"dkm": DKMOptions, "ewgs": EWGSOptions}
"""Methods that have options, each with its dataclass of them."""

AWARE_GRIDS = {"lsq": "full", "ewgs": "midrise", "dorefa": "midrise", "pact": "midrise"}
"""Methods of the uniform codec, each with the grid of its paper."""

__all__ = [
    "AWARE_GRIDS",
    "AWARE_METHODS",
    "AWARE_OPTIONS",
    "DKM",
    "EWGS",
    "LSQ",
    "PARAMETRIZATIONS",
    "ActivationSettings",
    "DKMOptions",
    "DoReFa",
    "EWGSOptions",
    "LeastSquares",
    "Rounded",
    "register_coreai_strategy",
]
