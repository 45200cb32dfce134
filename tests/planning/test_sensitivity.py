"""The sensitivities against plain formulas and exact expectations."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_r2.codecs.error import sqnr
from hf_r2.planning.sensitivity import diagonal_fisher, divergence, fisher_loss, relative_noise


def tensors(*shape, seed=0, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


class Softmax(nn.Module):
    """Logits W x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, inputs):
        return types.SimpleNamespace(logits=inputs @ self.weight.T)


def exact_fisher(weight, inputs):
    """E (∂ log p / ∂W)² = mean over x of p (1 − p) x²: the variance of a class's indicator times the input squared."""
    probabilities = (inputs.double() @ weight.double().T).softmax(dim=-1)
    return torch.einsum("nk,nj->kj", probabilities * (1 - probabilities), inputs.double().square()) / len(inputs)


def test_relative_noise_is_the_sqnr():
    weight, noise = tensors(7, 5, count=2)
    decoded = weight + 0.1 * noise
    assert relative_noise(weight, decoded) == pytest.approx(10 ** (-sqnr(weight, decoded) / 10), rel=1e-9)
    assert relative_noise(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


def test_fisher_loss_is_half_the_weighted_squares():
    fisher, weight, decoded = tensors(6, 40, count=3)
    expected = sum(
        f.item() * (a.item() - b.item()) ** 2
        for f, a, b in zip(fisher.flatten(), weight.flatten(), decoded.flatten(), strict=True)
    )
    assert fisher_loss(fisher, weight, decoded) == pytest.approx(expected / 2, rel=1e-9)


@given(st.integers(0, 1000), st.floats(0, 30))
def test_divergence_is_that_of_the_formula(seed, scale):
    ours, theirs = tensors(4, 3, seed=seed, count=2)
    ours, theirs = (scale * ours).double(), (scale * theirs).double()
    expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(dim=-1)
    torch.testing.assert_close(divergence(ours, theirs.log_softmax(-1)), expected, rtol=1e-6, atol=1e-12)
    assert (divergence(theirs, theirs.log_softmax(-1)) <= 1e-12).all()


def test_the_fisher_information_is_the_expectation_over_the_models_own_labels():
    weight, inputs = tensors(3, 4)[0], tensors(20000, 4, seed=1)[0]
    model = Softmax(weight)
    found = diagonal_fisher(model, {"w": model.weight, "unused": model.unused}, [{"inputs": inputs}])
    torch.testing.assert_close(found["w"].double(), exact_fisher(weight, inputs), rtol=0.06, atol=0)
    assert not found["unused"].any()


def test_the_fisher_form_is_the_divergence_of_small_changes_of_single_elements():
    weight, inputs = tensors(3, 4)[0], tensors(500, 4, seed=1)[0]
    reference = (inputs @ weight.T).double().log_softmax(-1)
    for row in range(3):
        changed = weight.clone()
        changed[row, row] += 0.05
        measured = divergence((inputs @ changed.T).double(), reference).mean().item()
        assert fisher_loss(exact_fisher(weight, inputs), weight, changed) == pytest.approx(measured, rel=0.05)
