import pytest
import torch
from uniform_weights import sample

from hf_r2.aware import ActivationSettings
from hf_r2.aware.pact import PACTInputs


def quantizer(bits=2):
    step = PACTInputs(ActivationSettings(bits, "pact"), by_token=False).train()
    step.active = True
    return step


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_are_those_of_the_formula(bits):
    step, inputs, upstream = quantizer(bits), (2 * sample(4, 30)).requires_grad_(), sample(4, 30, seed=1)
    step(inputs.detach())
    with torch.no_grad():
        step.alpha.fill_(1.7)
    result = step(inputs)
    (result * upstream).sum().backward()
    alpha, steps = step.alpha.item(), 2**bits - 1
    expected, grads, of_alpha = [], [], 0.0
    for x, g in zip(inputs.flatten().tolist(), upstream.flatten().tolist(), strict=True):
        expected.append(round(min(max(x, 0), alpha) * steps / alpha) * alpha / steps)
        grads.append(g if 0 <= x < alpha else 0.0)
        of_alpha += g if x >= alpha else 0.0
    torch.testing.assert_close(result.flatten().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad.flatten(), torch.tensor(grads))
    assert step.alpha.grad.item() == pytest.approx(of_alpha, rel=1e-4)


def test_the_clip_begins_with_the_largest_input_of_the_first_batch():
    step, inputs = quantizer(), sample(4, 30)
    step(inputs)
    assert step.alpha.item() == inputs.max()
    step(10 * inputs)
    assert step.alpha.item() == inputs.max()


def test_evaluation_needs_training_first_and_computes_as_it():
    step, inputs = quantizer(), sample(4, 30)
    with pytest.raises(ValueError, match="train with them first"):
        quantizer().eval()(inputs)
    trained = step(inputs)
    assert torch.equal(step.eval()(inputs), trained)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), -torch.ones(2, 3), torch.ones(1, 1)])
def test_a_constant_first_batch_has_a_clip(inputs):
    step = quantizer()
    result = step(inputs.requires_grad_())
    result.sum().backward()
    torch.testing.assert_close(result, inputs.relu())
    assert step.alpha.grad.isfinite().all()
