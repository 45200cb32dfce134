"""What other libraries make of the same float models, each at its own defaults but for bits and the kept layers.

Each of them is an extra; a cell whose library is not installed waits until it is.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import NamedTuple

import torch
from examples import Examples
from loop import steps
from results import Cell
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2 import select_weights

OUTER_BITS = 8


class Peer(NamedTuple):
    """Another library: the module that it is, and the extra of this project that installs it."""

    module: str
    extra: str


PEERS = {
    "coremltools": Peer("coremltools", "bench"),
    "quanto": Peer("optimum.quanto", "quanto"),
    "torchao": Peer("torchao", "torchao"),
}


def is_installed(peer: str | None) -> bool:
    """Tell whether the library of a cell is there; a cell of our own needs none."""
    return peer is None or find_spec(PEERS[peer].module) is not None


def compressed(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    """Compress a float model as another library does.

    Returns:
        The compressed model, and the bytes of its weights with their scales and tables; codes without gaps.
    """
    settings = spec["compression"]
    methods: dict[tuple[str, str], Callable] = {
        ("coremltools", "k-means"): _coremltools_kmeans,
        ("coremltools", "dkm"): _coremltools_dkm,
        ("quanto", "minmax"): _quanto,
        ("torchao", "intx"): _torchao_intx,
        ("torchao", "parq"): _torchao_parq,
    }
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return methods[settings["peer"], settings["method"]](with_linear_layers(model), spec, train)


def with_linear_layers(model: nn.Module) -> nn.Module:
    """Put the same linear layers in the place of transformers' Conv1D, which none of them knows."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            model.set_submodule(name, linear)
    return model


def layers(model: nn.Module, spec: Cell) -> Iterator[tuple[str, int]]:
    """Walk through the layers that are compressed, and their bits."""
    for name in select_weights(model):
        outer = any(fnmatchcase(name, pattern) for pattern in spec["first_and_last"])
        yield name.removesuffix(".weight"), OUTER_BITS if outer else spec["compression"]["bits"]


def _packed(model: nn.Module, spec: Cell, tables: int) -> int:
    """Count the bytes of codes without gaps between them, and of scales or tables of float32."""
    sizes = {name: getattr(*place).numel() for name, place in select_weights(model).items()}
    return 4 * tables + sum(math.ceil(sizes[f"{name}.weight"] * bits / 8) for name, bits in layers(model, spec))


def _coremltools_kmeans(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    from coremltools.optimize.torch.palettization import (
        ModulePostTrainingPalettizerConfig,
        PostTrainingPalettizer,
        PostTrainingPalettizerConfig,
    )

    names = {
        name: ModulePostTrainingPalettizerConfig(n_bits=bits, granularity="per_tensor", enable_fast_kmeans_mode=False)
        for name, bits in layers(model, spec)
    }
    tables = sum(2**bits for _, bits in layers(model, spec))
    nbytes = _packed(model, spec, tables)
    palettizer = PostTrainingPalettizer(model, PostTrainingPalettizerConfig(module_name_configs=names))
    return palettizer.compress(inplace=True), nbytes


def _coremltools_dkm(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    nbytes = _packed(model, spec, sum(2**bits for _, bits in layers(model, spec)))
    settings = spec["compression"]["training"]
    return coremltools_dkm(model, dict(layers(model, spec)), steps(model, settings, spec["seed"], train)), nbytes


def coremltools_dkm(model: nn.Module, bits: dict[str, int], training: Iterator[int]) -> nn.Module:
    """Train through coremltools' differentiable k-means, at its defaults but for the bits of the layers."""
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig, ModuleDKMPalettizerConfig

    names = {name: ModuleDKMPalettizerConfig(n_bits=each, weight_threshold=0) for name, each in bits.items()}
    palettizer = DKMPalettizer(model, DKMPalettizerConfig(module_name_configs=names))
    palettizer.prepare(inplace=True)
    for _ in training:
        palettizer.step()
    return palettizer.finalize(inplace=True)


def _quanto(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    from optimum import quanto

    kinds = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}
    names = dict(layers(model, spec))
    for bits in sorted(set(names.values())):
        quanto.quantize(model, weights=kinds[bits], include=[name for name in names if names[name] == bits])
    quanto.freeze(model)
    nbytes = 0
    for name, bits in names.items():
        weight = model.get_submodule(name).weight
        scales = sum(getattr(weight, key).numel() for key in ("_scale", "_shift") if hasattr(weight, key))
        nbytes += math.ceil(weight.numel() * bits / 8) + 4 * scales
    return model, nbytes


def _torchao_intx(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    """Compress linear layers; it has no convolutions, which stay float."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    nbytes = 0
    for name, bits in layers(model, spec):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))
            quantize_(model, config, filter_fn=lambda module, _, layer=layer: module is layer)
            scales = layer.weight.scale.nbytes + layer.weight.zero_point.nbytes
            nbytes += math.ceil(layer.weight.numel() * bits / 8) + scales
        else:
            nbytes += layer.weight.nbytes
    return model, nbytes


def _torchao_parq(model: nn.Module, spec: Cell, train: Examples) -> tuple[nn.Module, int]:
    """Train towards a uniform grid by piecewise-affine regularization for four fifths of the steps, then on it."""
    from torchao.prototype.parq import ProxPARQ, QuantOptimizer, UnifQuantizer

    settings = spec["compression"]["training"]
    by_bits: dict[int, list[nn.Parameter]] = {}
    for name, bits in layers(model, spec):
        by_bits.setdefault(bits, []).append(model.get_submodule(name).weight)
    chosen = {id(weight) for weights in by_bits.values() for weight in weights}
    groups = [{"params": [p for p in model.parameters() if id(p) not in chosen]}]
    groups += [{"params": weights, "quant_bits": bits} for bits, weights in by_bits.items()]
    per_channel = spec["grain"] == "channel"
    annealing = ProxPARQ(anneal_start=0, anneal_end=4 * settings["steps"] // 5)

    def wrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return QuantOptimizer(optimizer, UnifQuantizer(), annealing, quant_per_channel=per_channel)

    for _ in steps(model, settings, spec["seed"], train, groups=groups, wrap=wrap):
        pass
    scales = sum(len(weight) if per_channel else 1 for weights in by_bits.values() for weight in weights)
    return model, _packed(model, spec, scales)
