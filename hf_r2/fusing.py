"""Passes over weights that `torch.compile` fuses into one."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def fused(function: Callable) -> Callable:
    """Compile a function of tensors, for all shapes, once in a process."""
    return torch.compile(function, dynamic=True)
