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
from hf_r2.quantization.stream import NotStreamable, plan_stream
from hf_r2.quantization.tensor_files import DTYPE_WORDS, DTYPES, Layout, file_bytes
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
        ValueError: as `select_weights` does, and for checkpoints that are no float ones.
    """

    def __init__(
        self, source: str, include: Sequence[str] | None, skip: Sequence[str] | None, min_numel: int = 0
    ) -> None:
        config = R2QuantizationConfig(include=include, skip=skip, min_numel=min_numel, grain="tensor")
        try:
            plan = plan_stream(source, config)
        except NotStreamable:
            self._shards, self.weights = _of_model(source, config)
            return
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
        """Bytes of the safetensors files with these weights compressed, what is not compressed and headers included."""
        return sum(file_bytes(dict(self._becomes(shard, settings))) for shard in self._shards)

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
