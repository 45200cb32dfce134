"""Work on a device that is done again and again in the same place."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Recorded(Generic[Result]):
    """Work whose kernels the host launches at once, as a CUDA graph, from its second run on.

    Launching some dozens of kernels one by one takes the host longer than they take the device.

    Args:
        work: takes numbers, and launches kernels. What it does must depend on no value that the host would have to wait
            for, and what it reads and writes must stay where it is in memory.
        count: how many numbers it takes.
        device: where it is done.

    Attributes:
        result: what recorded runs return: the same tensors each time, with other values in them; None before.
    """

    def __init__(self, work: Callable[[Tensor], Result], count: int, device: torch.device) -> None:
        self._work = work
        self._input = torch.zeros(count, dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._filled_with: float | None = None
        self._has_run = False
        self.result: Result | None = None

    def __call__(self, value: Tensor | float) -> Result:
        """Do the work, on `(count,)` numbers, a scalar or a number that is all of them."""
        if isinstance(value, Tensor):
            self._input.copy_(value)
            self._filled_with = None
        elif value != self._filled_with:
            self._input.fill_(value)
            self._filled_with = value
        with on_device(self._input.device):
            if not self._input.is_cuda or not self._has_run or torch.cuda.is_current_stream_capturing():
                self._has_run = True  # what is computed once is there from now on, and kernels are compiled
                return self._work(self._input)
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                # Other threads, such as those that load data, may go on calling the device
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self.result = self._work(self._input)
            self._graph.replay()
        return self.result


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a CUDA device the current one, which kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
