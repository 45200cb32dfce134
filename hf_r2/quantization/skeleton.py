"""The structure of a checkpoint's model, without its weights."""

from collections.abc import Iterable

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hf_r2.quantization.config import QUANT_METHOD


def float_model_class(source: str) -> type[PreTrainedModel]:
    """Return the class of the model that a float checkpoint holds.

    Args:
        source: directory or Hub name.

    Raises:
        ValueError: if it is already quantized, or does not say which model class it holds.
    """
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is already quantized; name the float checkpoint it was made from")
    return architecture_class(config, source)


def compressed_model_class(source: str) -> type[PreTrainedModel]:
    """Return the class of the model that a compressed checkpoint holds.

    Args:
        source: directory or Hub name.

    Raises:
        ValueError: if it is not compressed by hf_r2, or does not say which model class it holds.
    """
    config = AutoConfig.from_pretrained(source)
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{source} is not compressed by hf_r2: name a checkpoint that hf-r2 quantize has made")
    return architecture_class(config, source)


def skeleton(source: str) -> PreTrainedModel:
    """Build the model of a checkpoint on the meta device: modules, names and shapes, and no weights.

    Args:
        source: directory or Hub name of a float or a compressed checkpoint.

    Raises:
        ValueError: if it does not say which model class it holds.
    """
    config = AutoConfig.from_pretrained(source)
    model_class = architecture_class(config, source)
    dtype = config.dtype
    with torch.device("meta"):
        model = model_class(config)
    config.dtype = dtype
    return model


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map the names of tensors in a checkpoint's files to those that loading gives them.

    They differ for models whose modules were renamed since their first release (ViT in transformers 5.23). Tensors that
    loading would also merge or split keep their names.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    known = model.state_dict()
    renamed = {name: rename_source_key(name, renamings, [], model.base_model_prefix, known)[0] for name in stored}
    return {name: name if name in known else new for name, new in renamed.items()}


def architecture_class(config: PretrainedConfig, source: str) -> type[PreTrainedModel]:
    """Return the model class that a checkpoint's config names.

    Raises:
        ValueError: if transformers has no such class.
    """
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None:
        raise ValueError(
            f"{source} names the architecture {architecture!r}, which this transformers does not have: "
            "save it with save_pretrained of a transformers model class"
        )
    return model_class
