"""Exports of compressed checkpoints to other runtimes and formats, in which weights stay low-bit codes."""

from hf_r2.export.exporter import FORMATS, export

__all__ = ["FORMATS", "export"]
