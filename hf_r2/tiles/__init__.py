"""Passes over many weights at once on a CUDA device, by kernels in Triton."""

from hf_r2.tiles.tiles import Tiles, can_be_tiled

__all__ = ["Tiles", "can_be_tiled"]
