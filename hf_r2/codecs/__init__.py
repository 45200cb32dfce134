"""Codecs: turn a weight into bit-packed codes and a codebook, and back."""

from hf_r2.codecs.encoded import CODECS, Encoded, decode, encode
from hf_r2.codecs.error import mse, sqnr
from hf_r2.codecs.settings import METHODS, CodecSettings

__all__ = ["CODECS", "METHODS", "CodecSettings", "Encoded", "decode", "encode", "mse", "sqnr"]
