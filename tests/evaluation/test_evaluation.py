import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_r2.evaluation import Accuracy, evaluate_classifier


class FixedLogits(nn.Module):
    """Answers with the logits it is given as its input."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, logits):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=logits)


def batches_of(predictions, labels, classes, size):
    """Batches whose logits are ln 3 for the predicted class and 0 for the others."""
    logits = nn.functional.one_hot(torch.tensor(predictions), classes) * math.log(3)
    labels = torch.tensor(labels)
    return [
        {"logits": logits[start : start + size], "labels": labels[start : start + size]}
        for start in range(0, len(labels), size)
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_a_classifier_is_measured_as_by_hand(size):
    result = evaluate_classifier(FixedLogits(), batches_of([0, 1, 2, 1, 0], [0, 1, 1, 1, 2], classes=3, size=size))
    # The softmax gives 3/5 to the predicted class and 1/5 to each other; three of five are right
    assert result["loss"] == pytest.approx(-(3 * math.log(3 / 5) + 2 * math.log(1 / 5)) / 5, rel=1e-6)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["examples"] == 5
    assert set(result) == {"accuracy", "loss", "examples", "collapsed"}


def test_the_model_runs_in_evaluation_mode_without_gradients():
    model = FixedLogits().train()
    evaluate_classifier(model, batches_of([0, 1], [0, 1], classes=2, size=1))
    assert model.modes == [(False, False), (False, False)]


def test_the_loss_of_half_precision_logits_is_computed_in_float32():
    batches = batches_of([0, 1, 2], [0, 1, 1], classes=3, size=3)
    exact = evaluate_classifier(FixedLogits(), batches)["loss"]
    batches[0]["logits"] = batches[0]["logits"].half()
    half = evaluate_classifier(FixedLogits(), batches)["loss"]
    assert half == pytest.approx(exact, rel=1e-3)
    assert half == pytest.approx(nn.functional.cross_entropy(batches[0]["logits"].float(), batches[0]["labels"]).item())


def test_the_batches_are_left_as_they_were_and_may_come_from_a_generator():
    batches = batches_of([0, 1], [0, 1], classes=2, size=1)
    result = evaluate_classifier(FixedLogits(), (batch for batch in batches))
    assert result["accuracy"] == 1
    assert all(set(batch) == {"logits", "labels"} for batch in batches)


def collapsed(right, labels, classes=10):
    """Evaluate a model that is right on the given number of examples and wrong on all others."""
    predictions = [label if index < right else (label + 1) % classes for index, label in enumerate(labels)]
    return evaluate_classifier(FixedLogits(), batches_of(predictions, labels, classes, size=len(labels)))["collapsed"]


def test_a_model_near_chance_has_collapsed():
    balanced = [index % 10 for index in range(900)]
    # Chance is 0.1 and its standard error sqrt(0.1 * 0.9 / 900) = 0.01, so the limit is 0.12 or 108 examples
    assert collapsed(0, balanced)
    assert collapsed(90, balanced)
    assert collapsed(107, balanced)
    assert not collapsed(109, balanced)
    assert not collapsed(900, balanced)


def test_chance_is_the_share_of_the_most_frequent_class():
    lopsided = [0] * 320 + [1] * 80
    # Chance is 0.8 and its standard error sqrt(0.8 * 0.2 / 400) = 0.02, so the limit is 0.84 or 336 examples
    assert collapsed(320, lopsided, classes=2)
    assert collapsed(335, lopsided, classes=2)
    assert not collapsed(337, lopsided, classes=2)


def test_always_guessing_one_class_has_collapsed():
    labels = [0] * 30 + [1] * 20
    result = evaluate_classifier(FixedLogits(), batches_of([0] * 50, labels, classes=2, size=7))
    assert result["accuracy"] == pytest.approx(0.6)
    assert result["collapsed"] is True


@pytest.mark.parametrize("empty", [[], iter(())])
def test_empty_data_is_refused(empty):
    with pytest.raises(ValueError, match="the evaluation data is empty"):
        evaluate_classifier(FixedLogits(), empty)


def test_accuracy_is_the_share_of_equal_predictions():
    assert Accuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 4]) == {"accuracy": 0.75}


def test_accuracy_adds_up_over_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[1, 2], references=[1, 0])
    metric.add_batch(predictions=[5], references=[5])
    result = metric.compute()
    assert result == {"accuracy": pytest.approx(2 / 3)}
    assert type(result["accuracy"]) is float


OFFLINE = """
import socket

def refuse(*arguments, **options):
    raise AssertionError("network used")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

from hf_r2.evaluation import Accuracy

print(Accuracy().compute(predictions=[1, 1, 0, 1], references=[1, 1, 1, 1]))
"""


def test_accuracy_needs_no_network(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'accuracy': 0.75}"
