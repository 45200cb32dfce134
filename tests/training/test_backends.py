"""Back ends and numeric settings of the Trainer: what is refused, and that the others change nothing."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from training_cases import (
    MODELS,
    assert_close,
    assert_same,
    l_inf_subgradient,
    logged,
    make_bert,
    make_data,
    snapshot,
)

from hf_r2.losses import RangeLoss
from hf_r2.training.backends import differentiable_loss, require_supported

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
LOSSES = {
    "l_inf": {"r2_loss": "l_inf"},
    "margin": {"r2_loss": "margin", "r2_margin_reduction": "sum", "r2_learning_rate": 0.05},
    "soft_min_max": {"r2_loss": "soft_min_max"},
    "crest": {"r2_strength": "auto", "r2_target_crest": 1.5},
    "ratio": {"r2_strength": "auto", "r2_target_gradient_ratio": 0.5},
}


def losses(*names):
    """Cases of `LOSSES`."""
    return pytest.mark.parametrize("loss", names)


def restricted(loss):
    return {"r2_strength": 0.05, **LOSSES[loss]}


@pytest.fixture
def fake_plugin(monkeypatch):
    """Makes every accelerator report a plugin, from here on."""

    def fake(**plugin):
        for name in ("deepspeed_plugin", "fsdp_plugin"):
            monkeypatch.setattr(AcceleratorState, name, None, raising=False)
        for name, settings in plugin.items():
            monkeypatch.setattr(AcceleratorState, name, SimpleNamespace(**settings))

    return fake


ZERO2 = {"deepspeed_plugin": {"zero_stage": 2, "enable_msamp": False}}
REFUSED = {
    "zero3": ({"deepspeed_plugin": {"zero_stage": 3}}, {}, "ZeRO-3 .*: use FSDP2 .*fsdp2.yaml.*, or ZeRO-2"),
    "zero3_prox": ({"deepspeed_plugin": {"zero_stage": 3}}, {"r2_mode": "prox"}, "ZeRO-3 .*: use FSDP2"),
    "zero3_teacher": (
        {"deepspeed_plugin": {"zero_stage": 3}},
        {"r2_mode": "none", "r2_teacher": "start"},
        "ZeRO-3 would cut the teacher as well: use FSDP2 .*, or ZeRO-2",
    ),
    "zero2_prox": (ZERO2, {"r2_mode": "prox"}, "r2_mode='prox': use r2_mode='loss', or use FSDP2"),
    "zero2_clip": (ZERO2, {"r2_mode": "clip"}, "r2_mode='clip': use r2_mode='loss', or use FSDP2"),
    "zero2_ratio": (ZERO2, LOSSES["ratio"], "r2_strength='auto' looks at: give r2_strength a number, or use FSDP2"),
    "zero2_crest": (ZERO2, LOSSES["crest"], "r2_strength='auto' looks at: give r2_strength a number, or use FSDP2"),
    "fsdp1": ({"fsdp_plugin": {"fsdp_version": 1}}, {}, "FSDP version 1 flattens weights.*: use FSDP2"),
    "fsdp1_clip": ({"fsdp_plugin": {"fsdp_version": 1}}, {"r2_mode": "clip"}, "FSDP version 1.*: use FSDP2"),
    "old_fsdp": ({"fsdp_plugin": {}}, {}, "FSDP version 1.*: use FSDP2"),
}


@pytest.mark.parametrize(
    ("plugin", "options", "message"), [pytest.param(*case, id=name) for name, case in REFUSED.items()]
)
def test_back_ends_that_hide_the_weights_are_refused(make_trainer, fake_plugin, plugin, options, message):
    trainer = make_trainer(make_bert(), make_data("bert", 8), **options)
    before = snapshot(trainer.model)
    fake_plugin(**plugin)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_same(snapshot(trainer.model), before)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused_for_losses(make_trainer, optim):
    with pytest.raises(ValueError, match=rf"optim='{optim}' updates .*: use another optimizer, or r2_mode='clip'"):
        make_trainer(make_bert(), make_data("bert", 8), optim=optim)


@pytest.mark.parametrize(
    ("plugin", "arguments"),
    [
        ({}, {}),
        (ZERO2, {}),
        ({"deepspeed_plugin": {"zero_stage": 1}}, {}),
        ({"fsdp_plugin": {"fsdp_version": 2}}, {}),
        ({"fsdp_plugin": {"fsdp_version": 2}}, {"r2_mode": "prox"}),
        ({}, {"r2_mode": "clip", "optim": "lomo"}),
        ({}, {"optim": "galore_adamw"}),
    ],
    ids=str,
)
def test_other_back_ends_and_optimizers_are_not(plugin, arguments):
    state = SimpleNamespace(**{name: SimpleNamespace(**settings) for name, settings in plugin.items()})
    args = SimpleNamespace(**{"r2_mode": "loss", "optim": "sgd", "r2_strength": 0.01, **arguments})
    accelerator = SimpleNamespace(state=state)
    require_supported(SimpleNamespace(args=args, accelerator=accelerator, compression=None, teacher=None))


@pytest.mark.parametrize("plugin", [{}, ZERO2], ids=["plain", "zero2"])
def test_the_loss_carries_the_gradient_only_where_the_back_end_takes_it_over(make_trainer, fake_plugin, plugin):
    trainer = make_trainer(make_bert(), make_data("bert", 8), r2_strength=0.5)
    plain = make_trainer(make_bert(), make_data("bert", 8), r2_mode="none")
    fake_plugin(**plugin)
    assert differentiable_loss(trainer) is bool(plugin)
    batch = next(iter(trainer.get_train_dataloader()))
    for one in (trainer, plain):
        one.model.train()
        one.compute_loss(one.model, dict(batch)).backward()
    expected = l_inf_subgradient(make_bert())
    for name, parameter in trainer.model.named_parameters():
        task = plain.model.get_parameter(name).grad
        own = 0.5 * expected[name] if plugin else 0
        torch.testing.assert_close(parameter.grad, task + own, rtol=1e-5, atol=1e-7)


@losses("l_inf", "margin", "soft_min_max")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero2_trains_as_without_it(make_trainer, fake_plugin, loss, accumulation):
    runs = []
    for plugin in ({}, ZERO2):
        settings = {"gradient_accumulation_steps": accumulation, **restricted(loss)}
        trainer = make_trainer(make_bert(), make_data("bert", 48), **settings)
        fake_plugin(**plugin)
        trainer.train()
        runs.append(trainer)
    plain, zero2 = runs
    assert logged(zero2, "r2_loss") == pytest.approx(logged(plain, "r2_loss"), rel=1e-4)
    assert logged(zero2, "r2_loss")[-1] > 0
    assert_close(snapshot(zero2.model), snapshot(plain.model), atol=1e-6)
    assert_close(snapshot(zero2.range_loss), snapshot(plain.range_loss), atol=1e-6)


@losses(*LOSSES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_scaler_changes_nothing(make_trainer, loss, accumulation):
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        settings = {"gradient_accumulation_steps": accumulation, **restricted(loss)}
        trainer = make_trainer(make_bert(), make_data("bert", 48), **settings)
        trainer.accelerator.scaler = scaler
        trainer.train()
        runs.append(trainer)
    plain, scaled = runs
    assert logged(scaled, "r2_loss") == pytest.approx(logged(plain, "r2_loss"), rel=1e-4)
    assert_close(snapshot(scaled.model), snapshot(plain.model), atol=1e-6)
    assert_close(snapshot(scaled.range_loss), snapshot(plain.range_loss), atol=1e-6)


@pytest.mark.parametrize("mode", ["loss", "prox", "clip"])
def test_a_step_that_the_scaler_skips_changes_no_weight(make_trainer, mode):
    trainer = make_trainer(make_bert(), make_data("bert", 8), r2_mode=mode, r2_strength=1.0, r2_clip=1.2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    trainer.train()
    assert_same(snapshot(trainer.model), snapshot(make_bert()))


def test_a_step_that_the_scaler_skips_chooses_no_strength(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 8), **LOSSES["ratio"])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert not trainer.strength_target.strengths.any()


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bfloat16_runs_with_a_float32_range_loss(train, half):
    model = make_bert() if half == "autocast" else make_bert().bfloat16()
    trainer = train(model, make_data("bert", 32), bf16=half == "autocast", r2_strength=0.05)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {next(model.parameters()).dtype}
    assert trainer.range_loss.measure().dtype == trainer.range_loss().dtype == torch.float32
    assert logged(trainer, "r2_loss")[-1] < logged(trainer, "r2_loss")[0]
    assert logged(trainer, "crest_factor")[-1] < logged(trainer, "crest_factor")[0]


def same_with_and_without(train, options, loss, name="bert", atol=1e-6):
    plain, changed = (
        train(MODELS[name](), make_data(name, 32), **restricted(loss), **extra) for extra in ({}, options)
    )
    for key in ("loss", "r2_loss", "task_loss"):
        assert logged(changed, key) == pytest.approx(logged(plain, key), abs=1e-5)
    assert_close(snapshot(changed.model), snapshot(plain.model), atol=atol)
    return changed


@losses(*LOSSES)
@pytest.mark.parametrize("name", ["dropout_bert", "llama"])
def test_gradient_checkpointing_changes_nothing(train, name, loss):
    same_with_and_without(train, {"gradient_checkpointing": True}, loss, name)


@losses("l_inf", "margin", "crest", "ratio")
def test_a_compiled_model_changes_nothing_and_leaves_the_range_loss_out(train, monkeypatch, loss):
    traced, measure = [], RangeLoss.measure

    def noted(self, *args):
        traced.append(torch.compiler.is_compiling())
        return measure(self, *args)

    monkeypatch.setattr(RangeLoss, "measure", noted)
    changed = same_with_and_without(train, {"torch_compile": True, "torch_compile_backend": "eager"}, loss)
    assert traced == [False] * 8
    assert changed.range_loss.compiled


def test_a_compiled_model_changes_nothing_in_the_projection_and_fuses_it(train):
    trainers = [
        train(MODELS["bert"](), make_data("bert", 32), r2_mode="prox", r2_strength=10.0, **extra)
        for extra in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    ]
    assert [trainer.range_projection.compiled for trainer in trainers] == [False, True]
    plain, changed = (snapshot(trainer.model) for trainer in trainers)
    assert_close(changed, plain, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("grain", ["tensor", "channel", 100])
@pytest.mark.parametrize("temperature", [None, 100.0])  # one exponential serves both ends; each needs its own
def test_compiled_soft_min_max_equals_the_eager_one(grain, temperature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(257, 300), nn.Conv2d(32, 64, 3), nn.Linear(64, 300))
    found = []
    for compiled in (False, True):
        model.zero_grad()
        loss = RangeLoss(model, "soft_min_max", grain, temperature=temperature)
        if compiled:
            loss.compile()
        value = loss.measure(0.5)
        loss.accumulate_grad_()
        weights = [layer.weight for layer in model]
        found.append([value, *(parameter.grad.clone() for parameter in (*weights, *loss.parameters()))])
    for eager, fused in zip(*found, strict=True):
        assert (fused - eager).norm() <= 2e-5 * eager.norm()


BROKEN = pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])


@BROKEN
@pytest.mark.parametrize("options", [*LOSSES.values(), {"r2_mode": "prox"}, {"r2_mode": "clip"}], ids=str)
def test_training_from_a_weight_that_is_not_finite_names_it(make_trainer, options, broken):
    model = make_bert()
    with torch.no_grad():
        model.bert.pooler.dense.weight[1, 2] = broken
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight.*: NaN or infinite values"):
        make_trainer(model, make_data("bert", 8), r2_include=["*pooler*", "classifier*"], **options).train()
