"""Train through least-squares binary bases, with the gradient passed straight through."""

import torch
from torch import Tensor

from hf_r2.aware.gradients import StraightThrough
from hf_r2.aware.rounded import Rounded
from hf_r2.codecs import CodecSettings, least_squares
from hf_r2.codecs.binary_bases import solve, warm_two
from hf_r2.grain import blocks, group_counts


class LeastSquares(Rounded):
    """Parametrization of a weight by its binary bases (Pouransari et al., arXiv 2001.02786, section 4).

    In training, the weight is `Σ v_i s_i`, its bases solved anew from the latent weight in every step and constants to
    the gradient, which reaches the latent weight unchanged. Bases of two bits take one sweep a step, from those of the
    step before; all others are solved as the codec does. In evaluation it is the compressed weight, whose bases the
    codec solves.

    Until [`start`] is called, the weight passes through as it is.

    Args:
        weight: as the layer holds it; its shape and device count.
        settings: of the least-squares codec.
        transpose: whether the layer keeps its output channels last (transformers' Conv1D).
        name: of the weight, for messages.

    Raises:
        ValueError: for a weight that FSDP2 has cut.
    """

    trained = ("basis",)

    def __init__(self, weight: Tensor, settings: CodecSettings, transpose: bool, name: str) -> None:
        super().__init__(settings, transpose, name)
        self.require_whole(weight, "bases need")
        self.swept = settings.bits == 2 and settings.basis == "optimal"
        # A forward pass that is repeated (gradient checkpointing) must not sweep again
        self.advance = True
        size, _ = least_squares.codebook_like((weight.T if transpose else weight).shape, settings)["basis"]
        zeros = torch.zeros(size, dtype=torch.float32, device=weight.device)
        self.register_buffer("basis", zeros, persistent=False)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Begin with the bases of the weight; without effect once begun.

        Raises:
            ValueError: for a weight with NaN or infinite values.
        """
        if not self.active:
            self.load(self.encoded(weight).codebook["basis"])

    def load(self, basis: Tensor) -> None:
        """Begin with these bases, `(groups, bits)`."""
        self.basis.copy_(basis)
        self.active = self.advance = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the binary weight: in training by the bases of this step, in evaluation the compressed one."""
        if not self.active or not self.training:
            return super().forward(weight)
        values = self.output_first(weight.detach())
        if self.advance:
            self.basis.copy_(self._improved(values))
            self.advance = False
        codes = least_squares.assign(values, self.basis, self.settings)
        binary = least_squares.dequantize(codes, {"basis": self.basis}, self.settings)
        result = StraightThrough.apply(weight, self.output_first(binary).to(weight.dtype))
        if result.requires_grad:
            result.register_hook(self._note_gradient)
        return result

    def _improved(self, values: Tensor) -> Tensor:
        parts = blocks(values, self.settings.grain)
        if not self.swept:
            return torch.cat([solve(block, self.settings.bits, self.settings.basis) for block in parts])
        before = self.basis.split(group_counts(values.shape, self.settings.grain))
        return torch.cat([warm_two(block, scales) for block, scales in zip(parts, before, strict=True)])

    def _note_gradient(self, gradient: Tensor) -> None:
        self.advance = True
