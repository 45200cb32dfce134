import pytest
from training_cases import MODELS, assert_same, logged, make_data, snapshot, train_logs
from transformers import Trainer

OFF = {"strength_0": {"r2_strength": 0.0}, "mode_none": {"r2_mode": "none", "r2_strength": 0.5}}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(
    "optimizer", [{"optim": "sgd"}, {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("name", ["resnet", "bert", "dropout_bert", "llama", "gpt2"])
def test_without_regularization_it_is_plain_trainer_bit_for_bit(train, name, optimizer, off):
    data = make_data(name, 40)
    settings = {"num_train_epochs": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "linear", **optimizer}
    plain = train(MODELS[name](), data, Trainer, **settings)
    ours = train(MODELS[name](), data, **settings, **OFF[off])
    assert_same(snapshot(ours.model), snapshot(plain.model))
    assert len(logged(plain)) == 10
    assert logged(ours) == logged(plain)
    assert logged(ours, "grad_norm") == logged(plain, "grad_norm")


@pytest.mark.parametrize("off", OFF)
def test_without_regularization_nothing_is_added_to_the_logs(train, off):
    trainer = train(MODELS["bert"](), make_data("bert", 16), **OFF[off])
    assert train_logs(trainer)[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def test_a_positive_strength_changes_the_weights(train):
    data = make_data("bert", 16)
    plain, ours = train(MODELS["bert"](), data, Trainer), train(MODELS["bert"](), data, r2_strength=0.1)
    with pytest.raises(AssertionError):
        assert_same(snapshot(ours.model), snapshot(plain.model))
