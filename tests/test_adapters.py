"""PEFT's adapters: what is restricted is the weight that the adapters will be merged into."""

import contextlib
import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_r2 import RangeProjection
from hf_r2.losses import RANGE_LOSSES, RangeLoss, l_inf
from hf_r2.selection import current_weights, output_first, select_weights

sys.path.append(str(Path(__file__).parent / "training"))
peft = pytest.importorskip("peft")

from training_cases import R2ZeroTaskTrainer, make_bert, make_data, make_gpt2, make_trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TARGETS = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj"]}
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Every training starts with a full collection, which need not look at the imported libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


def adapted(name, **options):
    """A tiny model with LoRA whose adapters are not zero."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": TARGETS[name]} | options
    model = {"bert": make_bert, "gpt2": make_gpt2}[name]()
    return peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=name == "gpt2", **settings))


def merged_weights(model):
    """Weights as compression will find them, by name and output channels first."""
    merged = copy.deepcopy(model).merge_and_unload()
    return dict(zip(select_weights(merged), current_weights(select_weights(merged)), strict=True))


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def explicit_weight(layer):
    """Base + scale · B @ A, output channels first, differentiable in A and B."""
    base = output_first(layer.get_base_layer(), layer.get_base_layer().weight)
    return base + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("gpt2", {}),
        ("bert", {"use_rslora": True}),
        ("bert", {"lora_dropout": 0.5}),
        ("bert", {"target_modules": "all-linear"}),
        ("bert", {"task_type": "SEQ_CLS"}),
    ],
    ids=str,
)
def test_selected_names_and_values_are_those_of_the_merged_model(name, options):
    model = adapted(name, **options).train()
    selection = select_weights(model)
    expected = merged_weights(model)
    assert [key.removeprefix("base_model.model.") for key in selection] == list(expected)
    for weight, merged in zip(current_weights(selection), expected.values(), strict=True):
        torch.testing.assert_close(weight.detach(), merged.detach(), rtol=1e-5, atol=1e-7)


def test_several_active_adapters_add_up():
    model = adapted("bert")
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["query", "key"]))
    model.base_model.set_adapter(["default", "other"])
    selection = select_weights(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    for name, weight in zip(selection, current_weights(selection), strict=True):
        expected = merged.get_parameter(name.removeprefix("base_model.model."))
        torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_loss_is_that_of_the_merged_weights_that_train(name, kind):
    model = adapted(name)
    merged = {key: value for key, value in merged_weights(model).items() if any(t in key for t in TARGETS[name])}
    holder = nn.ModuleDict({key.replace(".", "/"): nn.Linear(*reversed(w.shape)) for key, w in merged.items()})
    with torch.no_grad():
        for key, weight in merged.items():
            holder[key.replace(".", "/")].weight.copy_(weight)
    loss = RangeLoss(model, kind, "channel")
    assert list(loss.selection) == [f"base_model.model.{key}" for key in merged]
    assert loss.measure(0.5).item() == pytest.approx(0.5 * RangeLoss(holder, kind, "channel")().item(), rel=1e-4)


@pytest.mark.parametrize("form", ["in place", "differentiable"])
@pytest.mark.parametrize("grain", ["tensor", "channel"])
@pytest.mark.parametrize("name", TARGETS)
def test_gradients_reach_both_factors_and_equal_autograd(name, grain, form):
    model = adapted(name)
    factors = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    value = sum(l_inf(explicit_weight(layer), grain) for layer in layers(model).values())
    expected = torch.autograd.grad(0.5 * value, list(factors.values()))
    loss = RangeLoss(model, "l_inf", grain)
    if form == "in place":
        loss.measure(0.5)
        loss.accumulate_grad_()
    else:
        (0.5 * loss()).backward()
    for (key, factor), gradient in zip(factors.items(), expected, strict=True):
        assert gradient.any(), key
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def crest_of_merged(model):
    weights = [weight for key, weight in merged_weights(model).items() if any(t in key for t in TARGETS["bert"])]
    return sum((weight.abs().max() / weight.square().mean().sqrt()).item() for weight in weights) / len(weights)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_training_lowers_the_merged_crest_factor_and_leaves_the_base(tmp_path, options):
    crests = {}
    for strength in (0.0, 1.0):
        model = adapted("bert", init_lora_weights=True)
        base = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
        trainer = make_trainer(
            model, make_data("bert", 96), tmp_path / str(strength), R2ZeroTaskTrainer,
            learning_rate=0.03, max_steps=12, logging_steps=12, r2_loss="l_inf", r2_strength=strength, **options,
        )  # fmt: skip
        trainer.train()
        crests[strength] = crest_of_merged(model)
        assert [key for key, value in base.items() if not torch.equal(model.state_dict()[key], value)] == []
        if strength:
            assert trainer.state.log_history[-2]["crest_factor"] == pytest.approx(crests[strength], rel=1e-4)
    assert crests[1.0] < 0.9 * crests[0.0]


@pytest.mark.parametrize("kind", ["prox", "clip"])
def test_a_projection_is_refused_for_a_loss(kind):
    with pytest.raises(
        ValueError, match=r"query.weight is computed from other .* cannot be projected: use a range loss"
    ):
        RangeProjection(adapted("bert"), kind)


def test_a_gradient_ratio_is_refused_for_a_crest_factor(tmp_path):
    trainer = make_trainer(
        adapted("bert"), make_data("bert", 8), tmp_path, r2_strength="auto", r2_target_gradient_ratio=0.1
    )
    with pytest.raises(ValueError, match=r"query.weight is computed from .* give a strength or a target crest factor"):
        trainer.train()


def test_dora_is_refused_by_name():
    with pytest.raises(ValueError, match=rf"{QUERY}.weight is not one that adds to its weight .* exclude the weight"):
        RangeLoss(adapted("bert", use_dora=True))


def test_ia3_is_refused_by_name():
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    with pytest.raises(ValueError, match=f"{QUERY}.weight is not one that adds"):
        RangeLoss(peft.get_peft_model(make_bert(), config))


def test_an_excluded_adapter_is_not_looked_at():
    model = adapted("bert", use_dora=True, target_modules=["query"])
    for parameter in model.base_model.model.classifier.parameters():
        parameter.requires_grad_(True)
    assert list(RangeLoss(model, include=["*classifier.weight"]).selection) == ["base_model.model.classifier.weight"]


@pytest.mark.parametrize("name", TARGETS)
def test_merged_adapters_count_once(name):
    model = adapted(name)
    before = [weight.detach().clone() for weight in current_weights(select_weights(model))]
    model.merge_adapter()
    for weight, expected in zip(current_weights(select_weights(model)), before, strict=True):
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TARGETS)
def test_disabled_adapters_do_not_count(name):
    model = adapted(name)
    selection = select_weights(model)
    with model.disable_adapter():
        for (module, _), weight in zip(selection.values(), current_weights(selection), strict=True):
            base = getattr(module, "base_layer", module)
            assert torch.equal(weight, output_first(base, base.weight))
        with pytest.raises(ValueError, match="are frozen"):
            RangeLoss(model)


@pytest.mark.parametrize("how", ["merged", "disabled"])
def test_a_frozen_base_gets_no_gradient_once_its_adapters_are_off(how):
    model = adapted("bert")
    loss = RangeLoss(model)
    if how == "merged":
        model.merge_adapter()
    with model.disable_adapter() if how == "disabled" else contextlib.nullcontext():
        loss.measure()
        loss.accumulate_grad_()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
