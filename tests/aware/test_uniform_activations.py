import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uniform_weights import sample

from hf_r2.aware import ActivationSettings
from hf_r2.aware.uniform_activations import UniformInputs


def quantizer(by_token=False, **options):
    step = UniformInputs(ActivationSettings(method="uniform", **options), by_token)
    step.active = True
    return step


def reference(row, low, high, bits, symmetric):
    """Round one group in float64 by the grid of a range; also tell what is not clipped."""
    if symmetric:
        last = 2 ** (bits - 1) - 1
        scale, first = max(abs(low), abs(high)) / last, -last
    else:
        scale = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
        first = -round(-min(low, 0.0) / scale)
        last = 2**bits - 1 + first
    units = row / scale
    inside = (units >= first - 0.5) & (units <= last + 0.5)
    return units.round().clamp(first, last) * scale, inside


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grain", ["tensor", "token"])
def test_dynamic_values_are_those_of_the_formula_and_all_gradients_pass(bits, symmetric, grain):
    inputs, upstream = (0.5 + sample(3, 4, 20)).requires_grad_(), sample(3, 4, 20, seed=1)
    result = quantizer(by_token=True, bits=bits, symmetric=symmetric, grain=grain)(inputs)
    (result * upstream).sum().backward()
    groups = inputs.detach().double()
    groups = groups.flatten(1) if grain == "tensor" else groups.reshape(-1, 20)
    expected = [reference(row, row.min().item(), row.max().item(), bits, symmetric)[0] for row in groups]
    torch.testing.assert_close(result.double(), torch.stack(expected).view(3, 4, 20), rtol=1e-5, atol=1e-6)
    assert torch.equal(inputs.grad, upstream)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_range_clips_what_is_beyond_it(symmetric):
    step, seen = quantizer(bits=3, range="static", symmetric=symmetric).train(), sample(4, 30)
    step(seen)
    inputs, upstream = (3 * sample(4, 30, seed=2)).requires_grad_(), sample(4, 30, seed=1)
    result = step.eval()(inputs)
    (result * upstream).sum().backward()
    low, high = seen.min().item(), seen.max().item()
    expected, inside = reference(inputs.detach().double(), low, high, 3, symmetric)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(inputs.grad, upstream * inside)
    assert not inside.all()


def test_a_static_range_is_a_running_average_in_training_and_covers_calibration_data():
    batches = [(1 + seed) * sample(4, 30, seed=seed) for seed in range(3)]
    step = quantizer(range="static", momentum=0.5).train()
    for batch in batches:
        step(batch)
    highs = [batch.max() for batch in batches]
    torch.testing.assert_close(step.high, ((highs[0] + highs[1]) / 2 + highs[2]) / 2)
    step.restart()
    for batch in batches:
        step.eval()(batch)
    assert step.high == max(highs)
    assert step.low == min(batch.min() for batch in batches)


def test_training_and_evaluation_compute_the_same():
    inputs = sample(4, 30)
    for options in ({}, {"range": "static"}):
        step = quantizer(**options).train()
        trained = step(inputs)
        assert torch.equal(step.eval()(inputs), trained)


def test_evaluation_without_a_range_says_what_to_do():
    with pytest.raises(ValueError, match=r"range='static' has seen no data.*calibration_dataset"):
        quantizer(range="static").eval()(sample(2, 5))


def test_no_example_and_no_token_depends_on_another():
    images, tokens = sample(3, 2, 4, 4), sample(3, 5, 6)
    assert torch.equal(quantizer()(images)[1:2], quantizer()(images[1:2]))
    assert torch.equal(
        quantizer(by_token=True, grain="token")(tokens)[:, :3], quantizer(True, grain="token")(tokens[:, :3])
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["dynamic", "static"]),
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.sampled_from([0.0, 2.0, -3.0, 1e-30, 1e30]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_constant_inputs_of_any_shape_keep_their_value(bits, symmetric, span, shape, value, dtype):
    inputs = torch.full(shape, value, dtype=dtype)
    result = quantizer(bits=bits, symmetric=symmetric, range=span).train()(inputs)
    assert result.dtype == dtype
    torch.testing.assert_close(result, inputs)


def test_zero_stays_zero_on_every_grid():
    inputs = torch.cat([sample(4, 30) + 1, torch.zeros(4, 1)], dim=1)
    for symmetric in (True, False):
        assert not quantizer(bits=2, symmetric=symmetric)(inputs)[:, -1].any()
