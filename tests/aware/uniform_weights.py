"""What the tests of the methods that train uniform grids share."""

import torch

from hf_r2.codecs import CodecSettings
from hf_r2.grain import blocks, group_counts, join

SHAPE = (6, 3, 5)
GRAINS = ["tensor", "channel", 4]


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight():
    return 0.05 * sample(*SHAPE)


def make(method, values, bits=2, grid="midrise", grain="channel", options=(), transpose=False):
    """A started parametrization of a weight."""
    step = method(values, CodecSettings("uniform", bits, grain, grid=grid), *options, transpose, "layer.weight")
    step.start(values)
    return step


def groups_of(tensor, grain):
    """The groups of a weight, in the order of their learned values, as float64 vectors."""
    return [group.double() for block in blocks(tensor, grain) for group in block]


def put_back(groups, shape, grain):
    """The weight of the groups."""
    stacked, first = [], 0
    for count in group_counts(shape, grain):
        stacked.append(torch.stack(groups[first : first + count]))
        first += count
    return join(stacked, shape, grain)


def run(step, values, upstream):
    """The quantized weight, and the gradients of the latent weight and of what is learned."""
    latent = values.clone().requires_grad_()
    result = step(latent)
    (result * upstream).sum().backward()
    return result.detach(), latent.grad, {name: getattr(step, name).grad for name in step.learned}
