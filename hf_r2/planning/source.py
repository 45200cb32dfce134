"""What a plan starts from: the weights of a float checkpoint, one at a time, and what its files become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_r2.codecs import CodecSettings
from hf_r2.codecs.encoded import blank
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.hf_quantizer import R2HfQuantizer, unsaved
from hf_r2.quantization.quantizer import load_float_model
from hf_r2.quantization.skeleton import float_model_class
from hf_r2.quantization.stream import NotStreamable, plan_stream
from hf_r2.quantization.tensor_files import (
    DTYPE_WORDS,
    DTYPES,
    Layout,
    checkpoint_files,
    file_bytes,
    stored_tensors,
)
from hf_r2.selection import output_first


@dataclass(frozen=True)
class FloatWeight:
    """A weight that may be compressed.

    Args:
        shape: its shape, output channels first.
        dtype: its dtype.
        read: returns it, output channels first.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def nbytes(self, settings: CodecSettings) -> int:
        """Bytes of its packed codes and codebook."""
        return sum(tensor.nbytes for tensor in blank(self.shape, self.dtype, settings).tensors("").values())


class FloatCheckpoint:
    """A float checkpoint, read tensor by tensor where its files allow it; otherwise its model is held in memory.

    Attributes:
        weights: what may be compressed, by parameter name in the order of the selection; tied weights once.

    Args:
        source: directory or Hub name.
        include: see `select_weights`.
        skip: patterns of weights that stay as they are.
        min_numel: smallest number of elements that is compressed.

    Raises:
        ValueError: as `select_weights` does, and for a checkpoint that is already quantized.
    """

    def __init__(
        self, source: str, include: Sequence[str] | None, skip: Sequence[str] | None, min_numel: int = 0
    ) -> None:
        float_model_class(source)
        config = R2QuantizationConfig(include=include, skip=skip, min_numel=min_numel, grain="tensor")
        try:
            plan = plan_stream(source, config)
        except NotStreamable:
            self._shards, self.weights = _of_model(source, config)
            self._longer_names = _longer_names(source, self._shards)
            return
        self._longer_names = 0
        stored = {name: tensor for shard in plan.shards.values() for name, tensor in shard.items()}
        self._shards: list[Layout] = [
            {name: (tensor.dtype, tensor.shape) for name, tensor in shard.items()} for shard in plan.shards.values()
        ]

        def reader(name: str) -> Callable[[], Tensor]:
            turned = name in plan.turned
            return lambda: stored[name].read().T if turned else stored[name].read()

        self.weights: dict[str, FloatWeight] = {
            name: FloatWeight(encoded.shape, encoded.dtype, reader(name)) for name, encoded in plan.weights.items()
        }

    @property
    def numel(self) -> int:
        """Elements of all weights that may be compressed."""
        return sum(weight.shape.numel() for weight in self.weights.values())

    def file_bytes(self, settings: Mapping[str, CodecSettings]) -> int:
        """Bytes of the safetensors files with these weights compressed, what is not compressed and headers included.

        They are exact where the files are read tensor by tensor. Where transformers gives tensors other names in files
        than in the model, it is a few bytes a tensor too many.
        """
        return sum(file_bytes(dict(self._becomes(shard, settings))) for shard in self._shards) + self._longer_names

    def _becomes(
        self, shard: Layout, settings: Mapping[str, CodecSettings]
    ) -> list[tuple[str, tuple[str, tuple[int, ...]]]]:
        found = []
        for name, entry in shard.items():
            if name not in settings:
                found.append((name, entry))
                continue
            weight = self.weights[name]
            tensors = blank(weight.shape, weight.dtype, settings[name]).tensors(name)
            found += [(key, (DTYPE_WORDS[tensor.dtype], tuple(tensor.shape))) for key, tensor in tensors.items()]
        return found


def _longer_names(source: str, shards: Sequence[Layout]) -> int:
    """Bytes by which the names in a checkpoint's files may lengthen the header of the compressed one.

    A compressed weight has two tensors, so names cost up to twice what they cost in the float files.
    """
    try:
        files = checkpoint_files(source)
    except ValueError:  # no safetensors
        return 0
    theirs = sum(file.stat().st_size - sum(tensor.nbytes for tensor in stored_tensors(file).values()) for file in files)
    ours = sum(file_bytes(shard) - _data_bytes(shard) for shard in shards)
    return 2 * max(0, theirs - ours)


def _data_bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * DTYPES[word].itemsize for word, shape in layout.values())


def _of_model(source: str, config: R2QuantizationConfig) -> tuple[list[Layout], dict[str, FloatWeight]]:
    """Lay a checkpoint out as `save_pretrained` would, from its model."""
    model = load_float_model(source)
    left_out = unsaved(model)
    layout = {
        name: (DTYPE_WORDS[tensor.dtype], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    weights = {}
    for name, (module, attribute) in R2HfQuantizer(config, pre_quantized=False).selection(model).items():
        weight = output_first(module, getattr(module, attribute).detach())
        weights[name] = FloatWeight(weight.shape, DTYPES[layout[name][0]], lambda weight=weight: weight)
    return [layout], weights
