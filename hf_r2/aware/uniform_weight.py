"""What the methods that train uniform grids have in common: a block of groups in, codes and a scale per group out."""

import torch
from torch import Tensor, nn

from hf_r2.aware.rounded import Rounded
from hf_r2.codecs import CodecSettings, Encoded
from hf_r2.codecs.bitpack import pack
from hf_r2.codecs.uniform import symmetric_offset
from hf_r2.grain import blocks, group_counts, join

LEAST = 1e-8
"""Smallest width of what is learned: a group of zeros begins with it, and can grow."""


class UniformWeight(Rounded):
    """Parametrization of a weight by a symmetric uniform grid whose scale is trained with the weight.

    In training and in evaluation the weight is `(code − offset) · scale`, in the arithmetic of the codec, so that it is
    bit for bit what is stored; in training with the gradient that the method gives it. A method is a subclass with the
    names of its `learned` values, one of each per group, and the maths of one block: [`first_values`],
    [`codes_and_scale`] and [`train_block`].

    Until [`start`] is called, the weight passes through as it is. Learned values are parameters from the beginning, so
    that an optimizer made before that has them.

    Args:
        weight: as the layer holds it; its shape and device count.
        settings: of the uniform codec.
        transpose: whether the layer keeps its output channels last (transformers' Conv1D).
        name: of the weight, for messages.

    Raises:
        ValueError: for a grid that the method does not train, and for a weight that FSDP2 has cut.
    """

    learned: tuple[str, ...] = ()
    """Names of the parameters that are trained beside the weight."""

    grids: tuple[str, ...] = ("midrise",)
    """Grids of the codec that the method trains."""

    def __init__(self, weight: Tensor, settings: CodecSettings, transpose: bool, name: str) -> None:
        super().__init__(settings, transpose, name)
        self.require_whole(weight, "scales need")
        if settings.grid not in self.grids:
            raise ValueError(
                f"{name} has grid={settings.grid or 'none, but a zero point'}, which {type(self).__name__} does not "
                f"train: set symmetric=True and grid={' or '.join(map(repr, self.grids))}"
            )
        self.offset = symmetric_offset(settings)
        self.counts = group_counts(self.output_first(weight).shape, settings.grain)
        for value in self.learned:
            first = torch.ones(sum(self.counts), dtype=torch.float32, device=weight.device)
            self.register_parameter(value, nn.Parameter(first))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Begin with the first values of the weight; without effect once begun.

        Raises:
            ValueError: for a weight with NaN or infinite values.
        """
        if self.active:
            return
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weight {self.name!r} has NaN or infinite values; the training that made it diverged")
        found = [self.first_values(block.float()) for block in self._blocks(weight)]
        self.load(**{name: torch.cat([values[name] for values in found]) for name in self.learned})

    @torch.no_grad()
    def load(self, **values: Tensor) -> None:
        """Begin with these values, `(groups,)` each."""
        for name, value in values.items():
            getattr(self, name).copy_(value)
        self.active = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, with the gradient of the method in training."""
        if not self.active or not self.training:
            return super().forward(weight)
        rounded = [
            self.train_block(block.float(), **values)
            for block, values in zip(self._blocks(weight), self._values(), strict=True)
        ]
        return self.output_first(join(rounded, self.output_first(weight).shape, self.settings.grain).to(weight.dtype))

    @torch.no_grad()
    def encoded(self, weight: Tensor) -> Encoded:
        """Compress the weight as it is now, by the scale that was trained."""
        pairs = [
            self.codes_and_scale(block.float(), **values)
            for block, values in zip(self._blocks(weight.detach()), self._values(), strict=True)
        ]
        shape = self.output_first(weight).shape
        codes = join([codes.to(torch.uint8) for codes, _ in pairs], shape, self.settings.grain)
        scale = torch.cat([scale for _, scale in pairs])
        return Encoded(pack(codes, self.settings.bits), {"scale": scale}, shape, weight.dtype, self.settings)

    def first_values(self, block: Tensor) -> dict[str, Tensor]:
        """Say what the learned values of a block `(groups, n)` begin with, `(groups,)` each."""
        return {}

    def codes_and_scale(self, block: Tensor, **values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a block `(groups, n)` to codes of its shape, in float32, and scales `(groups,)`, not negative."""
        raise NotImplementedError

    def train_block(self, block: Tensor, **values: Tensor) -> Tensor:
        """Quantize a block to the values that its codes stand for, differentiably."""
        raise NotImplementedError

    def levels(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Decode codes of a block in float32, as the codec does."""
        return (codes - self.offset) * scale[:, None]

    def _blocks(self, weight: Tensor) -> list[Tensor]:
        return blocks(self.output_first(weight), self.settings.grain)

    def _values(self) -> list[dict[str, Tensor]]:
        """Take the learned values of every block."""
        parts = {name: getattr(self, name).float().split(self.counts) for name in self.learned}
        return [{name: part[block] for name, part in parts.items()} for block in range(len(self.counts))]
