"""Compression-aware training for any loop: attach, train, finalize."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_r2.adapters import AdaptedLayer, LatentLayer
from hf_r2.aware import AWARE_METHODS, AWARE_OPTIONS, PARAMETRIZATIONS, Rounded
from hf_r2.aware.activations import activate_inputs, quantize_inputs, release_inputs
from hf_r2.aware.input_quantizer import InputQuantizer
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.hf_quantizer import compress, layers_with_inputs
from hf_r2.selection import base_layer, require_match, select_weights


def attach(model: nn.Module, config: R2QuantizationConfig, start: bool = True) -> nn.Module:
    """Parametrize the selected weights, so that they train through their compression.

        attach(model, R2QuantizationConfig("palette", bits=2, aware="dkm"))
        …                                # train: any loop, Trainer, accelerate, DDP
        finalize(model).save_pretrained("model-2bit")

    The float parameters stay, as the latent weights that the optimizer moves; make the optimizer after this call.
    `state_dict` holds them under their own names, so that a checkpoint made in training is a float checkpoint like any
    other, with the trained centroids or bases beside them, which `load_state_dict` takes up again. In evaluation mode
    the model computes with the very weights that [`finalize`] stores.

    Args:
        model: float model; changed in place.
        config: `aware` names the method, `aware_options` has its options. Weights whose codec is not the one that the
            method trains are left to train as they are, and compressed in the end.
        start: whether to begin at once; else the weights train as they are until [`start_compression`].

    Returns:
        The model.

    Raises:
        ValueError: without a method in the config, for a model that is attached already, and for a weight that is tied,
            has adapters or another parametrization, or is cut by FSDP2.
    """
    if config.aware is None:
        methods = " or ".join(repr(method) for method in AWARE_METHODS)
        raise ValueError(f"the config names no compression-aware method: set aware to {methods}")
    if attached(model):
        raise ValueError("the model is trained through compression already: finalize it first")
    selection = select_weights(model, config.include, config.skip, config.min_numel)
    for pattern, _ in config.overrides:
        require_match(pattern, list(selection))
    tied = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    for name, (module, attribute) in selection.items():
        if name in tied:
            raise ValueError(f"{name} is tied to another weight and cannot train through compression: put it into skip")
        if isinstance(module, AdaptedLayer) or attribute not in module._parameters:
            raise ValueError(f"{name} is computed from other parameters: merge adapters, or put it into skip")
    steps = {name: _parametrization(config, name, module) for name, (module, _) in selection.items()}
    for name, (module, attribute) in selection.items():
        parametrize.register_parametrization(module, attribute, steps[name], unsafe=True)
        _keep_plain_names(module, steps[name])
    settings = config.activation_settings()
    if settings is not None:
        quantize_inputs(layers_with_inputs(selection, settings), settings)
    model.r2_quantization_config = config
    if start:
        start_compression(model)
    return model


def start_compression(model: nn.Module) -> None:
    """Let an attached model train through compression from here on; without effect once begun."""
    for layer, step in attached(model).values():
        step.start(layer.weight.detach())
    activate_inputs(model)


def attached(model: nn.Module) -> dict[str, tuple[LatentLayer, Any]]:
    """List the weights that train through compression, by name: the layer, with its latent weight, and its step."""
    config = getattr(model, "r2_quantization_config", None)
    if config is None:
        return {}
    selection = select_weights(model, config.include, config.skip, config.min_numel)
    return {name: (layer, layer.base_layer.parametrizations["weight"][0]) for name, (layer, _) in selection.items()}


def finalize(model: PreTrainedModel) -> PreTrainedModel:
    """Snap every attached weight to its codes, so that `save_pretrained` writes the compressed checkpoint.

    Args:
        model: attached model; changed in place. Its weights become what evaluation computed with, bit for bit.

    Returns:
        The model.

    Raises:
        ValueError: if it is not attached, or has not begun to train through compression.
    """
    weights = attached(model)
    if not weights:
        raise ValueError("the model is not trained through compression: attach(model, config) first, or use compress")
    if not all(step.active for _, step in weights.values()):
        raise ValueError("compression has not begun: train on, or call start_compression(model)")
    config = model.r2_quantization_config
    encoded = {name: step.encoded(layer.weight) for name, (layer, step) in weights.items()}
    _leave_latent(model)
    return compress(model, config, encoded)


def detach(model: nn.Module) -> None:
    """Undo [`attach`]: leave the latent float weights, as plain parameters, and the inputs as they are."""
    _leave_latent(model)
    release_inputs(model)


def _leave_latent(model: nn.Module) -> None:
    for layer, step in attached(model).values():
        for handle in step.handles:
            handle.remove()
        parametrize.remove_parametrizations(layer.base_layer, "weight", leave_parametrized=False)
    model.r2_quantization_config = None


def _parametrization(config: R2QuantizationConfig, name: str, module: nn.Module) -> nn.Module:
    settings = config.settings_for(name)
    transpose = isinstance(base_layer(module), Conv1D)
    if settings.method != AWARE_METHODS[config.aware]:
        return Rounded(settings, transpose, name)
    options = [AWARE_OPTIONS[config.aware](**config.aware_options)] if config.aware in AWARE_OPTIONS else []
    return PARAMETRIZATIONS[config.aware](module.weight.detach(), settings, *options, transpose, name)


def trained_names(model: nn.Module) -> list[str]:
    """List the names under which the state dict of an attached model holds what is trained beside its weights."""
    return [f"{name}_{value}" for name, (_, step) in attached(model).items() for value in step.trained]


def undecayed_names(model: nn.Module) -> set[str]:
    """List the parameters that quantizers learn and that weight decay would only pull away from what they measure.

    Without PACT's clips, whose weight decay is the penalty of its paper.
    """
    quantizers = [(name, each) for name, each in model.named_modules() if isinstance(each, Rounded | InputQuantizer)]
    return {
        f"{prefix}.{name}"
        for prefix, quantizer in quantizers
        for name, _ in quantizer.named_parameters()
        if name not in getattr(quantizer, "penalized", ())
    }


def _keep_plain_names(layer: nn.Module, step: Rounded) -> None:
    """Let the state dict have the latent weight under the weight's own name, and what is trained beside it."""

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}parametrizations.weight.original")
        for name in step.trained:
            state.pop(f"{prefix}parametrizations.weight.0.{name}", None)  # there if it is a parameter
            if step.active:
                state[f"{prefix}weight_{name}"] = getattr(step, name).detach()

    def load(state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
        if f"{prefix}weight" in state:
            state[f"{prefix}parametrizations.weight.original"] = state.pop(f"{prefix}weight")
        keys = {name: f"{prefix}weight_{name}" for name in step.trained}
        trained = {name: state.pop(key) for name, key in keys.items() if key in state}
        if trained:
            step.load(**trained)
        # Parameters are expected under their own names
        for name, parameter in step.named_parameters():
            state[f"{prefix}parametrizations.weight.0.{name}"] = parameter.detach()

    step.handles = [layer._register_state_dict_hook(save), layer._register_load_state_dict_pre_hook(load)]
