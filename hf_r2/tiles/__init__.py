"""Passes over many weights at once on a CUDA device, by kernels in Triton."""

from hf_r2.tiles.recorded import Recorded
from hf_r2.tiles.tiles import Tiles, can_be_tiled

__all__ = ["Recorded", "Tiles", "can_be_tiled"]
