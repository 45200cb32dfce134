"""Compressed checkpoints in transformers and optimum."""

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from hf_r2.quantization.attach import attach, attached, detach, finalize, start_compression
from hf_r2.quantization.config import QUANT_METHOD, R2QuantizationConfig
from hf_r2.quantization.hf_quantizer import R2HfQuantizer, compress
from hf_r2.quantization.packed import keep_packed

# Reloading the module must not fail on what is registered already
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(R2QuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(R2HfQuantizer)

__all__ = [
    "R2HfQuantizer",
    "R2QuantizationConfig",
    "attach",
    "attached",
    "compress",
    "detach",
    "finalize",
    "keep_packed",
    "start_compression",
]
