"""DoReFa: weights squashed by tanh, inputs clipped to [0, 1] (Zhou et al., arXiv 1606.06160)."""

from torch import Tensor

from hf_r2.aware.gradients import StraightThrough
from hf_r2.aware.input_quantizer import InputQuantizer
from hf_r2.aware.uniform_weight import UniformWeight
from hf_r2.codecs.uniform import divisor


class DoReFa(UniformWeight):
    """Parametrization of a weight by 2^b levels in [−1, 1], of its tanh; see [`UniformWeight`].

    For b > 1 the weight w becomes `2 Q(½ + tanh(w) / (2 max|tanh(w)|)) − 1`, where Q rounds to multiples of
    1 / (2^b − 1) (section 2.3, equation 9) and the maximum is the group's: one outlier takes the levels from all
    others. The gradient passes straight through Q, and through tanh and the maximum. For b = 1 it becomes
    `sign(w) E|w|` (equation 7) with sign(0) = 1, straight through.

    Nothing is learned beside the weight, and for b > 1 the result is of size 1 whatever the weight's: the layer needs a
    normalization behind it.
    """

    def codes_and_scale(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Take the levels of the formula; a group of zeros keeps them."""
        if self.settings.bits == 1:
            return (block >= 0).float(), 2 * block.abs().mean(dim=1)
        steps = 2**self.settings.bits - 1
        squashed = normalized(block)
        scale = (squashed.abs().amax(dim=1) > 0).to(block.dtype) * (2 / steps)
        return ((squashed + 1) / 2 * steps).round(), scale

    def train_block(self, block: Tensor) -> Tensor:
        """Take the levels, straight through to what was rounded."""
        latent = block if self.settings.bits == 1 else normalized(block)
        return StraightThrough.apply(latent, self.levels(*self.codes_and_scale(block.detach())))


def normalized(block: Tensor) -> Tensor:
    """Return `tanh(w) / max|tanh(w)|` of every group of a block `(groups, n)`, in [−1, 1]; zeros of zeros."""
    squashed = block.tanh()
    return squashed / divisor(squashed.abs().amax(dim=1, keepdim=True))


class DoReFaInputs(InputQuantizer):
    """Clips the input of a layer to [0, 1], rounds it to multiples of 1 / (2^b − 1) (section 2.4), straight through."""

    def quantized(self, inputs: Tensor) -> Tensor:
        """Clip and round float32 inputs."""
        clipped, steps = inputs.clamp(0, 1), 2**self.settings.bits - 1
        return StraightThrough.apply(clipped, (clipped.detach() * steps).round() / steps)
