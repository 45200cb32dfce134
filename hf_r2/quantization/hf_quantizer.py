"""The transformers quantizer behind `from_pretrained` and `save_pretrained`; the format is on FORMAT.md."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from hf_r2.aware.activations import (
    ActivationSettings,
    activate_inputs,
    input_quantizers,
    quantize_inputs,
    release_inputs,
)
from hf_r2.codecs import Encoded, decode, encode
from hf_r2.codecs.encoded import blank
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.integrity import content_digests, verify_content, verify_layout, verify_settings
from hf_r2.quantization.packed import is_packed, keeps_packed, pack, unpack_model
from hf_r2.quantization.workers import start_workers
from hf_r2.refine import refine_floats, refuse_steps_with_data
from hf_r2.selection import matches, output_first, require_match, select_weights


class R2HfQuantizer(HfQuantizer):
    """Compresses a float model after loading, or restores a compressed one; keeps the codes for saving.

    On disk a compressed weight `x.weight` is its packed codes under that very name, flat, so that a reader without
    hf_r2 stops at a size mismatch, and its codebook under `x.weight_<name>`. While transformers loads, the modules
    hold tensors of exactly these names; afterwards the decoded float weight, with the codes in `encoded`.
    """

    requires_calibration = False
    quantization_config: R2QuantizationConfig

    def __init__(self, quantization_config: R2QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.encoded: dict[str, Encoded] = {}
        self.steps: Sequence[str] = ()  # of refinement that are still to take

    def selection(self, model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Select the weights that the config compresses.

        Raises:
            ValueError: for a pattern without a match, an empty selection, and a weight that is not a plain parameter.
        """
        config = self.quantization_config
        selected = select_weights(model, config.include, config.skip, config.min_numel)
        for pattern, _ in config.overrides:
            require_match(pattern, list(selected))
        for name, (module, attribute) in selected.items():
            if attribute not in module._parameters and not is_packed(module):
                raise ValueError(
                    f"weight {name!r} is computed by a parametrization such as weight normalization and cannot be "
                    f"compressed: remove the parametrization, or put {name!r} into skip"
                )
        return selected

    def quantize_inputs(self, model: nn.Module, selection: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Quantize the inputs of the selected layers, if the config says so; statistics taken before are kept.

        Raises:
            ValueError: for a method that learns, if the model comes neither from training nor from a checkpoint.
        """
        settings = self.quantization_config.activation_settings()
        if settings is not None and not input_quantizers(model):
            if settings.learned and not self.pre_quantized:
                raise ValueError(
                    f"activations of method {settings.method!r} are learned in training: set aware and train with "
                    "R2Trainer or attach, or use method='uniform'"
                )
            quantize_inputs(layers_with_inputs(selection, settings), settings)
        activate_inputs(model)

    # --- loading ----------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Give a compressed checkpoint a skeleton whose tensors have the names, shapes and dtypes of the file."""
        if not self.pre_quantized:
            self.steps = self.quantization_config.refine
            refuse_steps_with_data(self.steps)
            return
        verify_layout(checkpoint_files or [], self.quantization_config.sha256)
        try:
            selection = self.selection(model)
            for name, (module, attribute) in selection.items():
                weight = getattr(module, attribute)
                settings = self.quantization_config.settings_for(name)
                self.encoded[name] = blank(output_first(module, weight).shape, weight.dtype, settings)
            verify_settings(self.encoded, self.quantization_config.sha256)
        except ValueError as error:
            saved = ", ".join(model.config.architectures or ["unknown"])
            hint = f"The checkpoint was saved from {saved}; load it with that class, this is {type(model).__name__}"
            raise ValueError(f"{error}. {hint}") from error
        self.quantize_inputs(model, selection)
        for name, (module, attribute) in selection.items():
            encoded = self.encoded[name]
            setattr(module, attribute, nn.Parameter(encoded.codes, requires_grad=False))
            # transformers initializes modules before it looks whether they were loaded, and flat codes have no fan-in
            module._is_hf_initialized = True
            for key, tensor in encoded.codebook.items():
                module.register_buffer(f"{attribute}_{key}", tensor)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Decode a compressed checkpoint's weights, or refine and compress a float model's."""
        refine_floats(model, self.steps)
        selection = self.selection(model)
        if self.pre_quantized:
            self._collect(selection)
            verify_content(*self._tensors(model), self.quantization_config.sha256)
        packed = keeps_packed()  # the threads have contexts of their own
        with start_workers() as workers:
            results = workers.in_order(partial(self._restored, decoding=not packed), selection.items())
            for name, encoded, decoded in tqdm(
                results, total=len(selection), desc="Compressing", unit="weight", disable=self.pre_quantized
            ):
                module, attribute = selection[name]
                self.encoded[name] = encoded
                if decoded is None:
                    pack(module, encoded, turned=isinstance(module, Conv1D))
                else:
                    setattr(module, attribute, nn.Parameter(decoded))
        self.quantize_inputs(model, selection)
        if packed:
            self._tie_packed(model)
            model.requires_grad_(False)
        else:
            model.tie_weights()
        # transformers would merge or split weights back into the layout of older checkpoints, and codes with them
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [entry for entry in conversions if not isinstance(entry, WeightConverter)]
        return model

    def _restored(
        self, selected: tuple[str, tuple[nn.Module, str]], decoding: bool
    ) -> tuple[str, Encoded, Tensor | None]:
        """Encode a selected weight that has no codes yet, and decode it unless it is to stay packed."""
        name, (module, attribute) = selected
        encoded = self.encoded.get(name)
        if encoded is None:
            encoded = encode(output_first(module, getattr(module, attribute)), self.quantization_config, name)
        return name, encoded, output_first(module, decode(encoded)).contiguous() if decoding else None

    def _tie_packed(self, model: PreTrainedModel) -> None:
        """Tie weights as `tie_weights` does, where codes stand for some of them."""
        for name, source in model.all_tied_weights_keys.items():
            module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if source in self.encoded:
                pack(module, self.encoded[source], turned=False)
            else:
                setattr(module, attribute, model.get_parameter(source))

    def _collect(self, selection: dict[str, tuple[nn.Module, str]]) -> None:
        """Move the loaded codes and codebooks off the modules."""
        for name, (module, attribute) in selection.items():
            encoded = self.encoded[name]
            encoded.codes = getattr(module, attribute).data
            encoded.codebook = {key: module._buffers.pop(f"{attribute}_{key}") for key in encoded.codebook}
            if encoded.codes.is_meta:
                raise ValueError("a device_map that offloads to disk is not supported: leave out the disk")

    # --- saving -----------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of the checkpoint and note their digests in the config, which is written after this.

        Raises:
            ValueError: if a weight is no longer what its codes say.
        """
        selection = self.selection(model)
        for name in selection.keys() ^ self.encoded.keys():
            raise ValueError(f"weight {name!r} came or went after compression: compress the changed model again")
        for name, (module, attribute) in selection.items():
            if is_packed(module):
                continue
            decoded = output_first(module, decode(self.encoded[name]))
            weight = getattr(module, attribute)
            if not torch.equal(decoded.to(weight), weight):
                raise ValueError(
                    f"weight {name!r} was changed after it was compressed (trained or edited), so its codes no longer "
                    "describe it: call `model.dequantize()` and compress it again, or save that float model"
                )
        codes, rest = self._tensors(model)
        self.quantization_config.sha256 = content_digests(self.encoded, codes, rest)
        return {**rest, **codes}, {}

    def _tensors(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split the checkpoint's tensors into codes with codebooks, and all others with tied ones once."""
        codes = {}
        for name, encoded in self.encoded.items():
            codes.update(encoded.tensors(name))
        left_out = codes.keys() | unsaved(model)
        rest = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in left_out and not name.endswith(".parametrizations.weight.original")
        }
        return codes, rest

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Keep the decoded float weights, and let go of the codes and of the quantizers of inputs."""
        unpack_model(model)
        model.tie_weights()
        self.encoded.clear()
        release_inputs(model)
        if isinstance(dtype, str):  # as save_pretrained leaves config.dtype
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Tell transformers that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed weights are not trained: their codes would go stale."""
        return False


def unsaved(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that a checkpoint leaves out: those that are tied to another, and those of no use."""
    return {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}


def layers_with_inputs(
    selection: Mapping[str, tuple[nn.Module, str]], settings: ActivationSettings
) -> dict[str, nn.Module]:
    """Take the layers whose inputs are quantized from a selection of weights.

    Raises:
        ValueError: for a pattern of `skip` without a match.
    """
    for pattern in settings.skip:
        require_match(pattern, list(selection))
    return {name: layer for name, (layer, _) in selection.items() if not matches(name, settings.skip)}


def compress(
    model: PreTrainedModel, config: R2QuantizationConfig, encoded: Mapping[str, Encoded] | None = None
) -> PreTrainedModel:
    """Refine and compress a float model in place, so that `save_pretrained` writes packed codes.

    Args:
        model: float model.
        config: how its weights are compressed.
        encoded: weights that are compressed already, by parameter name; the steps of `refine` are then the caller's.

    Raises:
        ValueError: if it is already compressed, for a step of `refine` that needs calibration data, and as the other
            steps, `encode` and `select_weights` do.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is already quantized; load the float checkpoint again, or call model.dequantize()")
    if encoded is None:
        refuse_steps_with_data(config.refine)
        refine_floats(model, config.refine)
    quantizer = R2HfQuantizer(config, pre_quantized=False)
    quantizer.encoded.update(encoded or {})
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    return model
