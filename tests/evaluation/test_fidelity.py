import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_r2.evaluation import evaluate_classifier
from hf_r2.evaluation.fidelity import Fidelity


def test_two_examples_by_hand():
    fidelity = Fidelity()
    ours = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    theirs = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    fidelity.add_batch(ours[:1], theirs[:1], torch.tensor([1]))
    fidelity.add_batch(ours[1:], theirs[1:], torch.tensor([1]))
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    figures = fidelity.compute()
    assert figures["kl"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert figures["agreement"] == 0.5  # ties go to the first class
    assert figures["float_accuracy"] == 0.5


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_the_divergence_does_not_depend_on_batches_or_on_constants_in_logits(examples, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, examples, classes, generator=generator)
    labels = torch.zeros(examples, dtype=torch.long)
    whole, parts = Fidelity(), Fidelity()
    whole.add_batch(ours, theirs, labels)
    for index in range(examples):
        parts.add_batch(ours[index, None] + 3, theirs[index, None] - 2, labels[:1])
    assert parts.compute()["kl"] == pytest.approx(whole.compute()["kl"], rel=1e-4, abs=1e-6)
    assert whole.compute()["kl"] >= -1e-6


class Scaled(nn.Module):
    """Answers with multiples of its input."""

    device = torch.device("cpu")

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, logits):
        return SimpleNamespace(logits=logits * self.scale)


def test_a_classifier_is_compared_with_its_float_model():
    batches = [{"logits": torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "labels": torch.tensor([0, 0])}]
    same = evaluate_classifier(Scaled(1), batches, float_model=Scaled(1))
    assert (same["agreement"], same["recovery"], same["float_accuracy"]) == (1.0, 1.0, 0.5)
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    turned = evaluate_classifier(Scaled(-1), batches, float_model=Scaled(1))
    assert (turned["agreement"], turned["recovery"]) == (0.0, 1.0)
    assert turned["kl"] > 0.1


def test_there_is_no_recovery_of_an_accuracy_of_zero():
    batches = [{"logits": torch.tensor([[2.0, 0.0]]), "labels": torch.tensor([1])}]
    assert evaluate_classifier(Scaled(1), batches, float_model=Scaled(1))["recovery"] is None
