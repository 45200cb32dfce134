"""High-bias absorption: shifts that ReLU lets through move into the next layer (Nagel et al., arXiv 1906.04721, 4.1.3).

Behind a batch norm with bias β and weight γ, nearly all values (three deviations) exceed c = max(0, β − 3|γ|). There
ReLU(x − c) = ReLU(x) − c, so c can be taken off and given back behind the next convolution, as its answer to c. The
ranges of activations shrink by c.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_r2.refine.chains import pairs, require_chains
from hf_r2.refine.matrices import response


@torch.no_grad()
def absorb_bias(model: PreTrainedModel) -> None:
    """Absorb high biases between neighbouring layers.

    The model computes nearly what it did: not for the rare values below c, nor where a convolution pads its input with
    zeros, which answers to c less than its sum there. ReLU6 becomes ReLU, see [`replace_relu6`].

    Args:
        model: transformers' ResNet, MobileNetV1 or MobileNetV2, under any head; changed in place.

    Raises:
        ValueError: for another architecture or activation.
    """
    for unit, following in pairs(require_chains(model, "absorb_bias")):
        shift = absorbed(unit.normalization)
        unit.normalization.bias -= shift
        # The next norm subtracts what its convolution answers to the constant no more
        following.normalization.running_mean -= response(following.convolution, following.convolution.weight, shift)


def absorbed(norm: nn.BatchNorm2d) -> Tensor:
    """Return c = max(0, β − 3|γ|) of every channel."""
    return (norm.bias - 3 * norm.weight.abs()).clamp_min(0)
