"""Layers as matrix products, against the layers themselves."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2.refine.matrices import input_rows, matrices, multiply, output_rows, response
from hf_r2.selection import output_first

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "vector": (lambda: nn.Linear(6, 4), (3, 6)),
    "gpt2": (lambda: Conv1D(4, 6), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(1, 2)), (2, 3, 6, 7)),
    "dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=(2, 1), stride=(1, 2)), (2, 3, 8, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2), (2, 4, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 5, 5)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0)), (2, 2, 3, 4, 4)),
}


def build(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrices_are_the_outputs(name):
    layer, inputs = build(name)
    expected = output_rows(layer, layer(inputs))
    positions = torch.randperm(len(expected))[:7]
    rows = input_rows(layer, inputs, positions)
    outputs = multiply(rows, matrices(layer, output_first(layer, layer.weight))) + layer.bias
    torch.testing.assert_close(outputs, expected[positions])


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"same", "reflected"}))
def test_the_response_is_the_output_for_constant_channels(name):
    layer, inputs = build(name)
    layer.padding = 0
    layer._reversed_padding_repeated_twice = [0] * 2 * (inputs.dim() - 2)
    channel = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
    constant = torch.randn(inputs.shape[channel], dtype=torch.float64)
    inputs = constant.expand(*inputs.shape[:1], *inputs.movedim(channel, -1).shape[1:-1], -1).movedim(-1, channel)
    expected = output_rows(layer, layer(inputs)) - layer.bias
    answer = response(layer, output_first(layer, layer.weight), constant)
    torch.testing.assert_close(answer.expand_as(expected), expected)
