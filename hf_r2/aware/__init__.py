"""Compression-aware training: each method a torch parametrization of the weight."""

from hf_r2.aware.coreai import register_coreai_strategy
from hf_r2.aware.dkm import DKM, DKMOptions
from hf_r2.aware.rounded import Rounded

AWARE_METHODS = ("dkm",)

__all__ = ["AWARE_METHODS", "DKM", "DKMOptions", "Rounded", "register_coreai_strategy"]
