"""The optimum quantizer: float checkpoint in, compressed checkpoint out."""

import inspect
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError
from optimum.quantization_base import OptimumQuantizer
from optimum.utils.save_utils import maybe_load_preprocessors
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging

from hf_r2.aware.activations import observe_inputs
from hf_r2.codecs import Encoded
from hf_r2.files import atomic_directory, resumable_directory, weight_file_bytes
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.hf_quantizer import compress
from hf_r2.quantization.quanto import check_quanto, quantize_by_quanto, save_by_quanto
from hf_r2.quantization.skeleton import float_model_class
from hf_r2.quantization.stream import NotStreamable, Plan, plan_stream, run_stream
from hf_r2.refine import REFINEMENTS, Refinement, refine_floats
from hf_r2.report.facts import weight_facts
from hf_r2.report.manifest import MANIFEST_NAME, Manifest
from hf_r2.selection import output_first, select_weights

logger = logging.get_logger(__name__)


class R2Quantizer(OptimumQuantizer):
    """Compresses a float checkpoint of any transformers model.

        R2Quantizer.from_pretrained("me/model").quantize("model-2bit", R2QuantizationConfig("palette", bits=2))

    Args:
        source: directory or Hub name of a float checkpoint; every call of [`quantize`] and [`stream`] reads it anew.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = str(source)

    @classmethod
    def from_pretrained(cls, model_or_path: str | os.PathLike[str]) -> "R2Quantizer":
        """Name the float checkpoint to compress.

        Raises:
            ValueError: if it is already quantized, or does not say which model class it holds.
        """
        quantizer = cls(model_or_path)
        float_model_class(quantizer.source)
        return quantizer

    def quantize(
        self,
        save_dir: str | os.PathLike[str],
        quantization_config: R2QuantizationConfig,
        calibration_dataset: Any = None,
        batch_size: int = 64,
        backend: str = "hf_r2",
    ) -> PreTrainedModel:
        """Compress the checkpoint, save it with its preprocessors and manifest, and load it.

        Where no step needs the whole model the weights are compressed one by one, as [`stream`] does; use that where
        the model that is returned would not fit into memory. The directory appears as a whole or not at all; an
        existing one is replaced only when the new one is complete.

        Args:
            save_dir: where the compressed checkpoint goes.
            quantization_config: how the weights are compressed.
            calibration_dataset: examples for `refine` and averages of activations: a map-style dataset of model
                inputs, or an iterable of batches (mappings of tensors), which is read once and kept. Labels are
                ignored.
            batch_size: examples of a calibration batch, for a dataset.
            backend: `"hf_r2"`, or `"quanto"` to leave for optimum-quanto: weights of 2, 4 or 8 bits on its grids, saved
                as its `QuantizedTransformersModel` reads them, without card and manifest. It is in maintenance, see
                `hf_r2.quantization.quanto`.

        Returns:
            The compressed model, its weights decoded; with quanto, as quanto runs it.

        Raises:
            ValueError: for a refinement without calibration data, and as the refinements, [`compress`] and
                [`select_weights`] do.
            ImportError: for the backend quanto without optimum-quanto.
        """
        if backend not in ("hf_r2", "quanto"):
            raise ValueError(f"unknown backend {backend!r}: use 'hf_r2' or 'quanto'")
        if backend == "quanto":
            return self._leave_for_quanto(save_dir, quantization_config)
        needing = [step for step in quantization_config.refine if REFINEMENTS[step]]
        if needing and calibration_dataset is None:
            raise ValueError(f"refine={needing} needs a calibration_dataset")
        activations = quantization_config.activation_settings()
        averaged = activations is not None and activations.moving_average != "off"
        if averaged and calibration_dataset is None:
            raise ValueError(f"activations={quantization_config.activations} needs a calibration_dataset")
        try:
            plan = plan_stream(self.source, quantization_config)
        except NotStreamable as reason:
            logger.info(f"{self.source} is compressed as a whole: {reason}")
        else:
            self._stream(plan, save_dir, workers=None)
            return type(plan.model).from_pretrained(save_dir)
        start = time.perf_counter()
        model = load_float_model(self.source)
        float_bytes = weight_file_bytes(self.source) or sum(tensor.nbytes for tensor in model.state_dict().values())
        batches = _Batches(model, calibration_dataset, batch_size)
        refine_floats(model, quantization_config.refine)
        floats = FloatWeights(model, quantization_config)
        refinement = Refinement(quantization_config.refine, floats.selection, batches)
        compress(model, quantization_config, encoded=refinement.round_weights(model, quantization_config))
        if averaged:
            observe_inputs(model, batches)
        refinement.correct(model)

        with atomic_directory(save_dir) as scratch:
            model.save_pretrained(scratch)
            weights = floats.compared_with(model.hf_quantizer.encoded)
            self._complete(scratch, model, quantization_config, weights, float_bytes, time.perf_counter() - start)
        return model

    def stream(
        self, save_dir: str | os.PathLike[str], quantization_config: R2QuantizationConfig, workers: int | None = None
    ) -> Path:
        """Compress the checkpoint tensor by tensor, and save it as [`quantize`] does.

        Every shard of the float checkpoint becomes one of the compressed checkpoint. Memory holds a tensor for every
        worker, and a small multiple of it. After an interruption or a kill the next call with the same source and
        config keeps the shards that are finished, once they agree with their SHA-256.

        Args:
            save_dir: where the compressed checkpoint goes; what is unfinished lies beside it, in
                `.<its name>.unfinished`.
            quantization_config: how the weights are compressed, without steps of `refine`.
            workers: threads, each of which compresses one tensor at a time; as many as torch may use without.

        Returns:
            The directory.

        Raises:
            NotStreamable: a ValueError, for a checkpoint or a config that takes the whole model at a time ([`quantize`]
                does that).
            ValueError: as `encode` and [`select_weights`] do.
        """
        try:
            plan = plan_stream(self.source, quantization_config)
        except NotStreamable as reason:
            raise NotStreamable(f"{self.source} cannot be streamed ({reason}): use quantize instead") from reason
        self._stream(plan, save_dir, workers)
        return Path(save_dir)

    def _stream(self, plan: Plan, save_dir: str | os.PathLike[str], workers: int | None) -> None:
        with resumable_directory(save_dir, plan.key) as scratch:
            done = run_stream(plan, self.source, scratch, workers)
            self._complete(scratch, plan.model, done.config, done.weights, plan.float_bytes, done.seconds)

    def _complete(
        self,
        scratch: Path,
        model: PreTrainedModel,
        config: R2QuantizationConfig,
        weights: list[dict[str, Any]],
        float_bytes: int,
        seconds: float,
    ) -> None:
        """Put preprocessors and the manifest beside the weights."""
        for preprocessor in maybe_load_preprocessors(self.source):
            preprocessor.save_pretrained(scratch)
        manifest = _manifest(self.source)
        manifest.add(
            "quantize",
            base_model=manifest.last("train").get("hub_model_id") or _base_model(self.source),
            license=_license(self.source),
            model_class=type(model).__name__,
            quantization_config=config.to_dict(),
            weights=weights,
            bytes={"float": float_bytes, "compressed": weight_file_bytes(scratch)},
            seconds=seconds,
        )
        manifest.save(scratch)

    def _leave_for_quanto(self, save_dir: str | os.PathLike[str], config: R2QuantizationConfig) -> PreTrainedModel:
        quanto = check_quanto(config)
        model = load_float_model(self.source)
        refine_floats(model, config.refine)
        quantize_by_quanto(model, config, quanto)
        with atomic_directory(save_dir) as scratch:
            save_by_quanto(model, scratch, quanto)
            for preprocessor in maybe_load_preprocessors(self.source):
                preprocessor.save_pretrained(scratch)
        return model


def load_float_model(source: str) -> PreTrainedModel:
    """Load a float checkpoint in the class that its config names.

    Raises:
        ValueError: if it is already quantized, lacks weights, or does not say which model class it holds.
    """
    model, info = float_model_class(source).from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks {len(info['missing_keys'])} tensors of {type(model).__name__}, for example "
            f"{min(info['missing_keys'])!r}: save the whole model, the missing ones would be random"
        )
    return model


class _Batches:
    """Batches of the inputs that a model's forward takes, without labels, the same at every walk through them.

    Args:
        model: whose inputs they are.
        dataset: map-style dataset of examples, which are read at every walk; or batches, which are kept.
        batch_size: examples of a batch, for a dataset.
    """

    def __init__(self, model: PreTrainedModel, dataset: Any, batch_size: int) -> None:
        self._accepted = set(inspect.signature(model.forward).parameters) - {"labels"}
        examples = hasattr(dataset, "__getitem__") and not isinstance(dataset, list)
        self._batches = (
            DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator)
            if examples
            else list(() if dataset is None else dataset)
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            yield {key: value for key, value in batch.items() if key in self._accepted}


class FloatWeights:
    """The weights that a config compresses, as they are before, for the manifest.

    Attributes:
        selection: the weights in the model, see [`select_weights`].
        weights: copies by parameter name, output channels first.

    Args:
        model: float model, also one that trains through compression.
        config: which weights it compresses.
    """

    def __init__(self, model: nn.Module, config: R2QuantizationConfig) -> None:
        self.selection = select_weights(model, config.include, config.skip, config.min_numel)
        self._shapes = {name: getattr(*place).shape for name, place in self.selection.items()}
        self.weights = {
            name: output_first(module, getattr(module, attribute)).detach().clone()
            for name, (module, attribute) in self.selection.items()
        }

    def compared_with(self, encoded: Mapping[str, Encoded]) -> list[dict[str, Any]]:
        """Per weight: its statistics, how it was compressed, and moments of the compressed one."""
        return [weight_facts(name, weight, self._shapes[name], encoded[name]) for name, weight in self.weights.items()]


def _base_model(source: str) -> str:
    """Name the float checkpoint: a Hub name as it is, a local one by its folder."""
    return Path(source).name if os.path.isdir(source) else source


def _manifest(source: str) -> Manifest:
    """Read the manifest of the float checkpoint; empty if it has none, or the Hub has another file of that name."""
    if os.path.isdir(source):
        return Manifest.load(source)
    try:
        return Manifest.load(Path(hf_hub_download(source, MANIFEST_NAME)).parent)
    except (OSError, ValueError, HTTPError):
        return Manifest()


def _license(source: str) -> str | None:
    """Read the license off the float checkpoint's card, if it has one."""
    try:
        path = Path(source) / "README.md" if os.path.isdir(source) else hf_hub_download(source, "README.md")
        return ModelCard.load(path).data.license
    except (OSError, ValueError, HTTPError):
        return None
