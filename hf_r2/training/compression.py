"""Compression-aware training in the Trainer: when it begins, what it warns of, and what it leaves."""

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_r2.aware.dkm import DKM
from hf_r2.aware.ewgs import HESSIAN
from hf_r2.aware.ewgs_delta import small_batches, update_deltas
from hf_r2.quantization import R2QuantizationConfig, attach, attached, compress, finalize, start_compression
from hf_r2.quantization.attach import trained_names
from hf_r2.quantization.quantizer import FloatWeights

logger = logging.get_logger(__name__)


class TrainedCompression:
    """Trains a Trainer's model through compression and compresses it in the end.

    Attributes:
        facts: for the manifest, once the model is compressed.
        floats: the float weights that it was compressed from.
        deltas_are_due: whether the next batch is one to find δ of EWGS with.

    Args:
        config: how; without a method in `aware` the model is compressed after training.
        start_ratio: share of the steps after which compression-aware training begins.

    Raises:
        ValueError: for a config with steps of `refine`, which are for [`R2Quantizer`]; if the inputs' quantization is
            learned, but nothing is trained through compression.
    """

    def __init__(self, config: R2QuantizationConfig, start_ratio: float) -> None:
        if config.refine:
            raise ValueError(
                f"the Trainer takes no steps of refine={config.refine}: leave them out, save the float model and "
                "compress it with R2Quantizer.from_pretrained(…).quantize(…)"
            )
        activations = config.activation_settings()
        if activations is not None and activations.learned and not config.aware:
            raise ValueError(f"activations of method {activations.method!r} are learned in training: set aware as well")
        self.config = config
        self.start_ratio = start_ratio
        self.facts: dict[str, Any] = {}
        self.floats: FloatWeights | None = None
        self._begun = self.deltas_are_due = False
        self._warned: set[str] = set()

    def attach(self, model: nn.Module, compiled: bool) -> None:
        """Parametrize a model that is not yet; on request passes over its weights are fused."""
        if self.config.aware and not attached(model):
            attach(model, self.config, start=False)
            self._begun = False
        for _, step in attached(model).values() if compiled else ():
            if isinstance(step, DKM):
                step.compile()

    def step(self, model: nn.Module, progress: float, new_epoch: bool) -> None:
        """Begin, once training has come far enough: progress is in 0–1."""
        begins = not self._begun and progress >= self.start_ratio
        if begins:
            new_epoch |= not any(step.active for _, step in attached(model).values())  # not for a run that is resumed
            start_compression(model)
            self._begun = True
        if self._begun and new_epoch and self.config.aware_options.get("delta") == HESSIAN:
            self.deltas_are_due = True

    def update_deltas(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Find δ of EWGS anew, with the first batch of an epoch or of compression."""
        update_deltas(model, small_batches(batch))
        self.deltas_are_due = False

    def warn(self, model: nn.Module) -> None:
        """Warn of temperatures that are too high, once per weight."""
        for name, (layer, step) in attached(model).items():
            for message in step.warnings(layer.weight) if name not in self._warned else ():
                logger.warning(message)
                self._warned.add(name)

    def finish(self, model: PreTrainedModel) -> None:
        """Compress the trained model, and note for the manifest what that did."""
        start = time.perf_counter()
        self.floats = FloatWeights(model, self.config)
        state = model.state_dict()
        float_bytes = sum(state[name].nbytes for name in state.keys() - trained_names(model))
        if self.config.aware:
            finalize(model)
        else:
            compress(model, self.config)
        self.facts = {
            "model_class": type(model).__name__,
            "quantization_config": self.config.to_dict(),
            "weights": self.floats.compared_with(model.hf_quantizer.encoded),
            "float_bytes": float_bytes,
            "seconds": time.perf_counter() - start,
        }
