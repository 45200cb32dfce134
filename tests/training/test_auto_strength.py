import math

import pytest
import torch
from training_cases import assert_same, logged, make_bert, make_data, make_resnet, snapshot

from hf_r2.losses import RangeLoss
from hf_r2.training.strength import FIRST_STRENGTH, GradientRatioTarget

CREST = {"r2_strength": "auto", "r2_target_crest": 2.0}
RATIO = {"r2_strength": "auto", "r2_target_gradient_ratio": 0.1}


@pytest.mark.parametrize(("mode", "loss"), [("loss", "l_inf"), ("loss", "soft_min_max"), ("prox", "l_inf")])
def test_every_weight_is_held_near_the_target_crest_factor(train, mode, loss):
    options = {"r2_mode": mode, "r2_loss": loss, "num_train_epochs": 40, "logging_steps": 40}
    trainer = train(make_resnet(), make_data("resnet", 64), **CREST, **options)
    assert logged(trainer, "crest_factor")[-1] == pytest.approx(2.0, rel=0.1)
    assert logged(trainer, "crest_factor_max")[-1] < 2.2
    assert logged(trainer, "r2_strength")[-1] == pytest.approx(trainer.strength_target.strengths.mean().item())


def test_the_integral_part_rises_above_the_target_and_falls_below_it(train):
    for target, rises in ((1.2, True), (50.0, False)):
        options = {"r2_strength": "auto", "r2_target_crest": target, "num_train_epochs": 5}
        trainer = train(make_bert(), make_data("bert", 16), **options)
        assert ((trainer.strength_target.state > math.log(FIRST_STRENGTH)) == rises).all()


def test_the_gradient_ratio_is_the_target_times_the_ratio_of_norms():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    loss = RangeLoss(model, "soft_min_max")
    target = GradientRatioTarget(loss, 0.25)
    model(torch.randn(3, 6)).square().sum().backward()
    task = [layer.weight.grad.clone() for layer in model]
    loss.measure(target.strengths)
    target.update()
    loss.accumulate_grad_()
    for layer, before in zip(model, task, strict=True):
        assert torch.equal(layer.weight.grad, before)  # the first step has no strength yet
    loss.measure(target.strengths)
    loss.accumulate_grad_()
    for layer, before in zip(model, task, strict=True):
        ratio = (layer.weight.grad - before).norm() / before.norm()
        assert ratio.item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("options", [CREST, RATIO], ids=["crest", "ratio"])
def test_resuming_goes_on_with_the_chosen_strengths(make_trainer, new_dir, options):
    data = make_data("bert", 24)
    options = {**options, "r2_loss": "margin", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(make_bert(), data, **options)
    straight.train()
    resumed = make_trainer(make_bert(), data, **options)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert_same(snapshot(resumed.model), snapshot(straight.model))
    assert torch.equal(resumed.strength_target.strengths, straight.strength_target.strengths)


def test_factors_act_on_top(train):
    options = {"r2_strength_factors": {"*classifier*": 0.0, "*query*": 2.0}, "num_train_epochs": 2}
    trainer = train(make_bert(), make_data("bert", 16), **CREST, **options)
    assert not any("classifier" in name for name in trainer.range_loss.selection)
    assert trainer.strength_target.strengths.shape == (len(trainer.range_loss.selection),)
