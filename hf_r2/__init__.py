"""Train without outliers, compress to 1–8 bits, publish honestly: range regularization for Hugging Face models.

Importing the package registers the quantization method `"hf_r2"` with transformers, so that `from_pretrained` reads
and makes compressed checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_r2 import losses
from hf_r2.codecs import decode, encode
from hf_r2.losses import RangeLoss
from hf_r2.projection import RangeProjection
from hf_r2.quantization import R2QuantizationConfig, attach, finalize, keep_packed
from hf_r2.report.statistics import weight_statistics
from hf_r2.selection import select_weights

if TYPE_CHECKING:
    from hf_r2.quantization.quantizer import R2Quantizer
    from hf_r2.training import R2Mixin, R2Trainer, R2TrainingArguments

__version__ = "0.1.0"

__all__ = [
    "R2Mixin",
    "R2QuantizationConfig",
    "R2Quantizer",
    "R2Trainer",
    "R2TrainingArguments",
    "RangeLoss",
    "RangeProjection",
    "attach",
    "decode",
    "encode",
    "finalize",
    "keep_packed",
    "losses",
    "select_weights",
    "weight_statistics",
]

_ON_DEMAND = {
    "R2Mixin": "hf_r2.training",
    "R2Quantizer": "hf_r2.quantization.quantizer",
    "R2Trainer": "hf_r2.training",
    "R2TrainingArguments": "hf_r2.training",
}
"""Names that need Trainer, datasets or optimum, which take half of a second and 250 MB: imported when asked for."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name]), name)
