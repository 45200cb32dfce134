import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uniform_weights import GRAINS, SHAPE, groups_of, make, put_back, run, sample, weight

from hf_r2.aware import EWGS, ActivationSettings, EWGSOptions
from hf_r2.aware.ewgs import EWGSInputs
from hf_r2.codecs import CodecSettings, decode

LARGE = EWGSOptions(delta=0.5)


def reference(group, lower, upper, upstream, bits, delta, elements):
    """x_q and the gradients of x, l and u by equation 5, element by element in float64, for a gradient at x_q."""
    steps, width = 2**bits - 1, upper - lower
    levels, grads, of_lower, of_upper = [], [], 0.0, 0.0
    for x, g in zip(group.tolist(), upstream.tolist(), strict=True):
        x_n = min(max((x - lower) / width, 0.0), 1.0)
        x_q = round(steps * x_n) / steps
        scaled = g * (1 + delta * math.copysign(1, g) * (x_n - x_q))
        inside = lower <= x <= upper
        levels.append(x_q)
        grads.append(scaled * inside / width)
        of_lower += -scaled * inside * (1 - x_n) / width
        of_upper += -scaled * inside * x_n / width
    factor = 1 / math.sqrt(elements * steps)
    levels, grads = (torch.tensor(each).double() for each in (levels, grads))
    return levels, grads, of_lower * factor, of_upper * factor


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("grain", GRAINS)
def test_values_and_gradients_are_those_of_the_formula(bits, grain):
    step, upstream = make(EWGS, weight(), bits, grain=grain, options=[LARGE]), sample(*SHAPE, seed=1)
    with torch.no_grad():
        step.lower.mul_(0.5)
        step.upper.mul_(0.4)
    result, grad, learned = run(step, weight(), upstream)
    values, grads, bounds, outputs = [], [], [], []
    ends = zip(*(getattr(step, name).tolist() for name in ("lower", "upper", "output")), strict=True)
    groups = zip(groups_of(weight(), grain), groups_of(upstream, grain), ends, strict=True)
    for group, part, (lower, upper, output) in groups:
        at_levels = 2 * output * part
        levels, of_group, *of_bounds = reference(group, lower, upper, at_levels, bits, 0.5, len(group))
        values.append(2 * output * (levels - 0.5))
        grads.append(of_group)
        bounds.append(of_bounds)
        outputs.append((part * 2 * (levels - 0.5)).sum() / math.sqrt(len(group) * (2**bits - 1)))
    torch.testing.assert_close(result.double(), put_back(values, SHAPE, grain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), put_back(grads, SHAPE, grain), rtol=1e-4, atol=1e-5)
    for name, expected in zip(("lower", "upper"), zip(*bounds, strict=True), strict=True):
        torch.testing.assert_close(learned[name].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learned["output"].double(), torch.stack(outputs), rtol=1e-4, atol=1e-5)


def test_it_begins_with_three_deviations_and_the_mean_of_the_weight():
    step = make(EWGS, weight(), options=[EWGSOptions()])
    deviation = weight().flatten(1).std(dim=1, correction=0)
    torch.testing.assert_close(step.upper.detach(), 3 * deviation)
    torch.testing.assert_close(step.lower.detach(), -3 * deviation)
    means = [tensor.flatten(1).abs().mean(dim=1) for tensor in (step(weight()).detach(), weight())]
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_evaluation_and_codec_compute_the_same_bits(bits, dtype):
    values = weight().to(dtype)
    step = make(EWGS, values, bits, grain=4, options=[LARGE])
    with torch.no_grad():
        step.output.mul_(-1.3)
    trained = step(values)
    assert trained.dtype == dtype
    assert torch.equal(step.eval()(values), trained)
    assert torch.equal(decode(step.encoded(values)), trained)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.sampled_from(GRAINS),
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.sampled_from([0.0, 1.0, -1e-20]),
)
def test_constant_weights_of_any_shape_train_and_encode(bits, grain, shape, value):
    values = torch.full(shape, value)
    step = make(EWGS, values, bits, grain=grain, options=[LARGE])
    result, grad, learned = run(step, values, torch.ones(shape))
    assert torch.equal(decode(step.encoded(values)), result)
    for tensor in (result, grad, *learned.values()):
        assert tensor.isfinite().all()


def test_bounds_that_have_crossed_stay_finite():
    step = make(EWGS, weight(), options=[LARGE])
    with torch.no_grad():
        step.lower.add_(10)
    result, grad, learned = run(step, weight(), torch.ones(SHAPE))
    for tensor in (result, grad, *learned.values()):
        assert tensor.isfinite().all()


def test_only_the_grid_of_the_paper_is_trained_and_delta_is_checked():
    with pytest.raises(ValueError, match=r"w has grid=full.*grid='midrise'"):
        EWGS(weight(), CodecSettings("uniform", 2, grid="full"), EWGSOptions(), False, "w")
    with pytest.raises(ValueError, match="delta=-1"):
        EWGSOptions(delta=-1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("positive", [True, False])
def test_inputs_and_their_gradients_are_those_of_the_formula(bits, positive):
    inputs = 0.5 + 2 * sample(3, 2, 8)
    inputs = (inputs.relu() if positive else inputs).requires_grad_()
    step = EWGSInputs(ActivationSettings(bits, "ewgs", delta=0.5), by_token=False).train()
    step.active = True
    step(inputs.detach())
    assert step.lower.item() == inputs.min()
    deviation = inputs.detach().std(correction=0).item()
    assert step.upper.item() == pytest.approx(3 * deviation / math.sqrt(1 - 2 / math.pi))
    with torch.no_grad():
        step.upper.mul_(0.5)
    upstream = sample(3, 2, 8, seed=1)
    result = step(inputs)
    (result * upstream).sum().backward()
    lower, upper = step.lower.item(), step.upper.item()
    flat, at_levels = inputs.detach().flatten().double(), upstream.flatten().double() * (upper - lower)
    levels, grads, of_lower, of_upper = reference(flat, lower, upper, at_levels, bits, 0.5, 16)
    torch.testing.assert_close(result.flatten().double(), lower + (upper - lower) * levels, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad.flatten().double(), grads, rtol=1e-4, atol=1e-5)
    # What maps the levels back depends on the bounds as well
    factor = 1 / math.sqrt(16 * (2**bits - 1))
    of_lower += (upstream.flatten() * (1 - levels)).sum().item() * factor
    of_upper += (upstream.flatten() * levels).sum().item() * factor
    assert step.lower.grad.item() == pytest.approx(of_lower, rel=1e-3, abs=1e-5)
    assert step.upper.grad.item() == pytest.approx(of_upper, rel=1e-3, abs=1e-5)
    assert torch.equal(step.eval()(inputs), result)
