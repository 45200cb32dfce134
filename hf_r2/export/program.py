"""A model as a program that exporters read: its inputs by task, its axes, and logits as its only output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# The name at the top level needs torchvision in transformers 5.10
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pytorch_utils import Conv1D

from hf_r2.codecs import Encoded
from hf_r2.evaluation.checkpoint import task_of_architecture

_SIDE = 64  # of an image before processing


@dataclass(frozen=True)
class ExampleInputs:
    """Inputs that a model is traced with.

    Args:
        tensors: the inputs by name, in their order.
        axes: the axes whose sizes are free in the export, by input name and by dimension.
    """

    tensors: dict[str, Tensor]
    axes: dict[str, dict[int, str]]


class Logits(nn.Module):
    """A model that takes its inputs in the order of their names and returns its logits alone.

    The model's parameters have their own names behind `"model."`.
    """

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the logits."""
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return self.model(**dict(zip(self.names, inputs, strict=True)), **cache, return_dict=True).logits


def example_inputs(model: PreTrainedModel, source: str, batch: int = 2, length: int = 8) -> ExampleInputs:
    """Make inputs for a classifier of images or texts, or a causal language model.

    Images are float32 `(batch, channels, height, width)`, of the size that its image processor makes, or else of the
    config's, with a free batch; texts are int64 `(batch, length)`, both free, with an attention mask and, for models
    of pairs, token types.

    Args:
        model: the model.
        source: its checkpoint.
        batch: examples; a free axis needs more than one, which would be taken for a constant.
        length: tokens of a text.

    Raises:
        ValueError: for another task.
    """
    architecture = type(model).__name__
    task = task_of_architecture(architecture)
    if task == "image-classification":
        pixels = torch.zeros(batch, *_image_shape(model.config, source), dtype=torch.float32)
        return ExampleInputs({"pixel_values": pixels}, {"pixel_values": {0: "batch"}})
    if task is not None:
        names = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        values = {"input_ids": 1, "attention_mask": 1, "token_type_ids": 0}
        tensors = {name: torch.full((batch, length), values[name], dtype=torch.int64) for name in names}
        return ExampleInputs(tensors, {name: {0: "batch", 1: "length"} for name in names})
    raise ValueError(
        f"{source} is a {architecture}: what can be exported to this format is classifiers of images or texts, and "
        "causal language models"
    )


def traced(model: PreTrainedModel, inputs: ExampleInputs, fixed: bool = False) -> torch.export.ExportedProgram:
    """Trace a model from its inputs to its logits, with free axes or with fixed ones."""
    kind = torch.export.Dim.STATIC if fixed else torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(inputs.axes[name], kind) for name in inputs.tensors)
    program = Logits(model, list(inputs.tensors)).eval()
    return torch.export.export(program, tuple(inputs.tensors.values()), dynamic_shapes={"inputs": shapes}, strict=False)


def _image_shape(config: PretrainedConfig, source: str) -> tuple[int, ...]:
    """Channels, height and width of what the image processor makes of a square, or else of what the config says."""
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except OSError:
        size = getattr(config, "image_size", None)
        if not isinstance(size, int):
            raise ValueError(
                f"{source} does not say how large images are: save its image processor beside it"
            ) from None
        return getattr(config, "num_channels", 3), size, size
    square = torch.zeros(getattr(config, "num_channels", 3), _SIDE, _SIDE, dtype=torch.uint8)
    return tuple(processor(images=square, return_tensors="pt")["pixel_values"].shape[1:])


def compressed_parameters(model: PreTrainedModel) -> dict[str, Encoded]:
    """Return the compressed weights of a model by all names that their parameters have, tied ones included."""
    encoded = dict(model.hf_quantizer.encoded)
    for name, source in model.all_tied_weights_keys.items():
        if source in encoded:
            encoded[name] = encoded[source]
    return encoded


def is_turned(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a layer has the output channels of its weight second."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
