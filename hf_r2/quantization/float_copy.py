"""The float copy of a compressed checkpoint, for readers without hf_r2."""

import os

from optimum.utils.save_utils import maybe_load_preprocessors
from transformers import PreTrainedModel

from hf_r2.files import atomic_directory
from hf_r2.quantization.skeleton import compressed_model_class


def dequantize(source: str | os.PathLike[str], save_dir: str | os.PathLike[str]) -> PreTrainedModel:
    """Save the decoded weights of a compressed checkpoint as an ordinary float checkpoint, with its preprocessors.

    Its weights are those that the compressed model computes with, in the dtype that it was saved with. Inputs that the
    compressed model quantizes stay float in the copy.

    Args:
        source: directory or Hub name of a compressed checkpoint.
        save_dir: where the float checkpoint goes; it appears as a whole or not at all.

    Returns:
        The float model.

    Raises:
        ValueError: if the source is not compressed by hf_r2.
    """
    source = os.fspath(source)
    model = compressed_model_class(source).from_pretrained(source)
    model.dequantize()
    with atomic_directory(save_dir) as scratch:
        model.save_pretrained(scratch)
        for preprocessor in maybe_load_preprocessors(source):
            preprocessor.save_pretrained(scratch)
    return model
