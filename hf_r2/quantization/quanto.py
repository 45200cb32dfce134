"""The exit to optimum-quanto, for who needs its kernels or its formats rather than hf_r2's.

Quanto's maintainers have put it into maintenance: 0.2.7, which the extra `quanto` pins, is its last release, and only
small fixes are accepted. 2 and 4 bits compile C++ at their first use and need a compiler. Plain `from_pretrained` on
such a folder returns random weights; load it with quanto's own classes.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_r2.codecs import CodecSettings
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.selection import select_weights

_BITS = (2, 4, 8)
_STEPS = ("equalize", "absorb_bias")
_MAP = "quanto_qmap.json"


def check_quanto(config: R2QuantizationConfig) -> Any:
    """Check that quanto is there and can do what a config asks for, and return its module.

    Raises:
        ImportError: naming the extra, without optimum-quanto.
        ValueError: for what quanto does not have.
    """
    if config.activations or config.aware:
        raise ValueError("backend='quanto' takes weights only: leave out activations and aware")
    beyond = [step for step in config.refine if step not in _STEPS]
    if beyond:
        raise ValueError(f"backend='quanto' rounds by itself: remove {beyond} from refine")
    try:
        import optimum.quanto as quanto
    except ImportError as error:
        raise ImportError('optimum-quanto is not installed: pip install "hf_r2[quanto]"') from error
    return quanto


def quantize_by_quanto(model: PreTrainedModel, config: R2QuantizationConfig, quanto: Any) -> None:
    """Quantize the selected weights of a float model in place, on quanto's own grids.

    8 bits are symmetric per channel; 4 and 2 bits affine in groups of 128 inputs where these divide them.

    Args:
        model: float model.
        config: which weights, and how many bits each: 2, 4 or 8.
        quanto: the module `optimum.quanto`.

    Raises:
        ValueError: for other settings than bits, and for layers other than Linear and Conv2d.
    """
    names: dict[int, list[str]] = {bits: [] for bits in _BITS}
    for name, (layer, _) in select_weights(model, config.include, config.skip, config.min_numel).items():
        settings = config.settings_for(name)
        if settings.bits not in _BITS or settings != CodecSettings(bits=settings.bits):
            raise ValueError(
                f"backend='quanto' has grids of its own, of 2, 4 or 8 bits: for {name!r} set bits to one of these, and "
                "leave method, grain and the other options at their defaults"
            )
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"quanto has no {type(layer).__name__}: put {name!r} into skip")
        names[settings.bits].append(name.removesuffix(".weight"))
    for bits, layers in names.items():
        if layers:
            quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"), include=layers)
    quanto.freeze(model)


def save_by_quanto(model: PreTrainedModel, directory: Path, quanto: Any) -> None:
    """Write a frozen model as quanto's `QuantizedTransformersModel` reads it: safetensors and a quantization map."""
    # Quanto looks for input embeddings if this is set, which image models do not have
    model.config.tie_word_embeddings = bool(getattr(model, "all_tied_weights_keys", None))
    model.save_pretrained(directory)
    text = json.dumps(quanto.quantization_map(model), indent=1)
    (directory / _MAP).write_text(text, encoding="utf-8")
