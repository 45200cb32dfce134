"""Layers of odd sizes, and all that range losses and projections say about them, whole or cut over two processes."""

import itertools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from hf_r2 import RangeLoss, RangeProjection
from hf_r2.moments import shapes
from hf_r2.selection import current_weights

GRAINS = ["tensor", "channel", 4, 5]
# Options of RangeLoss. Which of several tied elements is in a tail is not defined, so tied weights have none here
LOSSES = {
    "l_inf": {"kind": "l_inf"},
    "margin_max": {"kind": "margin", "margin_reduction": "max"},
    "margin_sum": {"kind": "margin", "margin_reduction": "sum"},
    "soft_min_max": {"kind": "soft_min_max"},
    "tail": {"kind": "tail", "tail_fraction": 0.1, "exclude": ["tied.weight"]},
    "kurtosis": {"kind": "kurtosis"},
}
PROJECTIONS = ["clip", "prox"]
# The mesh's shape, and how each of its dimensions cuts a weight
LAYOUTS = {
    "outputs": ((2,), [Shard(0)]),
    "inputs": ((2,), [Shard(1)]),
    "replicated": ((2,), [Replicate()]),
    "replicas_of_outputs": ((1, 2), [Replicate(), Shard(0)]),
    "outputs_and_inputs": ((2, 1), [Shard(0), Shard(1)]),
}
EMPTY = {
    "outputs": ["one_output"],
    "inputs": ["one_input", "gpt"],
    "replicated": [],
    "replicas_of_outputs": ["one_output"],
    "outputs_and_inputs": ["one_output"],
}
"""Layers of whose weights the second process holds nothing."""


def all_cases():
    """Layout, method, grain and dtype by name. Values in bfloat16 tie so often that no tail is defined."""
    cases = {}
    for case in itertools.product(LAYOUTS, [*LOSSES, *PROJECTIONS], GRAINS, ["float64", "float32", "bfloat16"]):
        layout, method, _, dtype = case
        if dtype != "bfloat16" or (layout in ("outputs", "inputs") and method != "tail"):
            cases["-".join(map(str, case))] = case
    return cases


def make_layers(dtype):
    """Uneven cuts, cuts that leave a process nothing, a channel of zeros, ties, and a weight large enough to sample."""
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "odd": nn.Linear(11, 7),
            "one_output": nn.Linear(9, 1),
            "one_input": nn.Linear(1, 6),
            "conv": nn.Conv2d(3, 5, 3),
            "gpt": Conv1D(13, 1),
            "tied": nn.Linear(10, 9),
            "large": nn.Linear(165, 201),
        }
    )
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(torch.randn(layer.weight.shape))
        layers["odd"].weight[2] = 0
        layers["tied"].weight.mul_(4).round_().clamp_(-5, 5).div_(4)
    return layers.to(dtype)


def cut(layers, layout):
    """Cut the weights of layers that lie whole on both processes."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("first", "second")[: len(shape)])
    for layer in layers.values():
        # The output channels of a Conv1D are its second dimension
        flipped = {Shard(0): Shard(1), Shard(1): Shard(0), Replicate(): Replicate()}
        own = [flipped[placement] if isinstance(layer, Conv1D) else placement for placement in placements]
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, own))
    return layers


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def measure(layers, method, grain):
    """Everything that a loss or a projection says about the layers, as whole tensors by name."""
    results = projected(layers, method, grain) if method in PROJECTIONS else losses(layers, LOSSES[method], grain)
    crest_factors, kurtoses = zip(
        *shapes(current_weights({name: (layer, "weight") for name, layer in layers.items()})), strict=True
    )
    return results | {"crest_factor": torch.stack(crest_factors), "kurtosis": torch.stack(kurtoses)}


def losses(layers, options, grain):
    loss = RangeLoss(layers, grain=grain, factors={"conv.weight": 0.5}, **options)
    results = {f"first {name}": whole(value) for name, value in loss.named_parameters()}
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(torch.linspace(0.3, 1.2, len(parameter)))
    value = loss()
    value.backward()
    results |= {"value": whole(value), **gradients(layers, loss, "backward")}
    # In place, with a strength for each weight, on top of the weights' gradient
    loss.zero_grad()
    results["measured"] = loss.measure(torch.linspace(0.5, 2, len(loss.selection)))
    results["ratios"] = loss.gradient_ratios()
    loss.accumulate_grad_()
    return results | gradients(layers, loss, "accumulated")


def gradients(layers, loss, prefix):
    parameters = {name: layer.weight for name, layer in layers.items()} | dict(loss.named_parameters())
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return {f"{prefix} {name}": whole(gradient) for name, gradient in found.items()}


def projected(layers, kind, grain):
    projection = RangeProjection(layers, kind, grain, clip=1.3, factors={"conv.weight": 0.5})
    results = {}
    # The second step starts from the limits of the first
    for step, strength in enumerate([0.3, torch.linspace(0.1, 0.7, len(layers))]):
        projection.step(strength)
        results |= {f"step {step} {name}": whole(layer.weight) for name, layer in layers.items()}
    return results
