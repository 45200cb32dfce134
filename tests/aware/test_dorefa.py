import math

import pytest
import torch
from uniform_weights import GRAINS, SHAPE, groups_of, make, put_back, run, sample, weight

from hf_r2.aware import ActivationSettings, DoReFa
from hf_r2.aware.dorefa import DoReFaInputs
from hf_r2.codecs import CodecSettings, decode


def reference(group, upstream, bits):
    """DoReFa of one group, in float64: values, and gradient through tanh and its maximum."""
    if bits == 1:
        return torch.where(group >= 0, 1.0, -1.0).double() * group.abs().mean(), upstream
    steps = 2**bits - 1
    squashed = torch.tensor([math.tanh(w) for w in group.tolist()]).double()
    largest = squashed.abs().max()
    values = 2 * ((squashed / (2 * largest) + 0.5) * steps).round() / steps - 1
    slope = 1 - squashed.square()
    grads = upstream * slope / largest
    at = squashed.abs().argmax()
    grads[at] -= (upstream * squashed).sum() / largest**2 * squashed[at].sign() * slope[at]
    return values, grads


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("grain", GRAINS)
def test_values_and_gradients_are_those_of_the_formula(bits, grain):
    values, upstream = 20 * weight(), sample(*SHAPE, seed=1)
    result, grad, _ = run(make(DoReFa, values, bits, grain=grain), values, upstream)
    pairs = zip(groups_of(values, grain), groups_of(upstream, grain), strict=True)
    expected, grads = zip(*(reference(group, part, bits) for group, part in pairs), strict=True)
    torch.testing.assert_close(result.double(), put_back(list(expected), SHAPE, grain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), put_back(list(grads), SHAPE, grain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_evaluation_and_codec_compute_the_same_bits(bits, dtype):
    values = weight().to(dtype)
    step = make(DoReFa, values, bits, grain=4)
    trained = step(values)
    assert trained.dtype == dtype
    assert torch.equal(step.eval()(values), trained)
    assert torch.equal(decode(step.encoded(values)), trained)


@pytest.mark.parametrize("bits", [1, 2])
def test_zeros_stay_zeros_and_single_elements_become_one(bits):
    zeros, single = torch.zeros(2, 3), torch.tensor([[-0.3]])
    result, grad, _ = run(make(DoReFa, zeros, bits), zeros, torch.ones(2, 3))
    assert not result.any()
    assert grad.isfinite().all()
    expected = -0.3 if bits == 1 else -1.0
    torch.testing.assert_close(make(DoReFa, single, bits)(single), torch.tensor([[expected]]))


def test_only_the_grid_of_the_paper_is_trained():
    with pytest.raises(ValueError, match=r"w has grid=full.*grid='midrise'"):
        DoReFa(weight(), CodecSettings("uniform", 2, grid="full"), False, "w")


@pytest.mark.parametrize("bits", [2, 4])
def test_inputs_are_clipped_to_one_and_rounded(bits):
    inputs = sample(3, 7).requires_grad_()
    step = DoReFaInputs(ActivationSettings(bits, "dorefa"), by_token=False)
    step.active = True
    result, upstream = step(inputs), sample(3, 7, seed=1)
    (result * upstream).sum().backward()
    steps = 2**bits - 1
    torch.testing.assert_close(result.double(), (inputs.detach().double().clamp(0, 1) * steps).round() / steps)
    inside = (inputs >= 0) & (inputs <= 1)
    assert torch.equal(inputs.grad, upstream * inside)
    assert not list(step.state_dict())
