import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uniform_weights import GRAINS, SHAPE, groups_of, make, put_back, run, sample, weight

from hf_r2.aware import LSQ, ActivationSettings
from hf_r2.aware.lsq import LSQInputs
from hf_r2.codecs import CodecSettings, decode

GRIDS = [(1, "midrise"), (2, "full"), (2, "restricted"), (2, "midrise"), (3, "full"), (8, "full")]


def limits(bits, grid):
    """Q_N and Q_P of a grid."""
    half = 2 ** (bits - 1)
    return {"full": (half, half - 1), "restricted": (half - 1, half - 1), "midrise": (half - 0.5, half - 0.5)}[grid]


def reference(group, step, upstream, bits, grid, elements=None):
    """LSQ element by element, in float64: values, gradient of the elements, gradient of the step."""
    q_n, q_p = limits(bits, grid)
    shift = 0.5 if grid == "midrise" else 0.0
    values, grads, of_step = [], [], 0.0
    for v, g in zip(group.tolist(), upstream.tolist(), strict=True):
        exact = v / step
        level = round(min(max(exact, -q_n), q_p) + shift) - shift
        level = min(max(level, -q_n), q_p)
        inside = -q_n <= exact <= q_p
        values.append(step * level)
        grads.append(g * inside)
        of_step += g * (level if bits == 1 or not inside else level - exact)
    factor = 1 / math.sqrt((elements or len(group)) * q_p)
    return torch.tensor(values).double(), torch.tensor(grads).double(), of_step * factor


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@pytest.mark.parametrize("grain", GRAINS)
def test_values_and_gradients_are_those_of_the_formula(bits, grid, grain):
    step, upstream = make(LSQ, weight(), bits, grid, grain), sample(*SHAPE, seed=1)
    result, grad, learned = run(step, weight(), upstream)
    found = [
        reference(group, scale, part, bits, grid)
        for group, scale, part in zip(
            groups_of(weight(), grain), step.scale.tolist(), groups_of(upstream, grain), strict=True
        )
    ]
    values, grads, of_steps = zip(*found, strict=True)
    torch.testing.assert_close(result.double(), put_back(list(values), SHAPE, grain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), put_back(list(grads), SHAPE, grain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(learned["scale"].double(), torch.tensor(of_steps).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_the_step_begins_as_in_the_paper(bits, grid):
    step = make(LSQ, weight(), bits, grid)
    highest = 1 if bits == 1 else limits(bits, grid)[1]
    expected = 2 * weight().flatten(1).abs().mean(dim=1) / math.sqrt(highest)
    torch.testing.assert_close(step.scale.detach(), expected)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_evaluation_and_codec_compute_the_same_bits(bits, grid, grain, dtype):
    values = weight().to(dtype)
    step = make(LSQ, values, bits, grid, grain)
    with torch.no_grad():
        step.scale.mul_(0.7)
    trained = step(values)
    assert trained.dtype == dtype
    assert torch.equal(step.eval()(values), trained)
    assert torch.equal(decode(step.encoded(values)), trained)
    levels = 2**bits - (grid == "restricted")
    assert all(len(group.unique()) <= levels for group in groups_of(trained, grain))


def test_two_bits_of_the_restricted_grid_are_ternary():
    step = make(LSQ, weight(), 2, "restricted", "tensor")
    scale = step.scale.item()
    assert set(step(weight()).flatten().tolist()) == {-scale, 0.0, scale}


def test_a_step_below_zero_counts_by_its_magnitude():
    step, upstream = make(LSQ, weight(), 2, "full"), sample(*SHAPE, seed=1)
    expected, _, learned = run(step, weight(), upstream)
    with torch.no_grad():
        step.scale.neg_()
        step.scale.grad = None
    result, _, mirrored = run(step, weight(), upstream)
    assert torch.equal(result, expected)
    assert torch.equal(mirrored["scale"], -learned["scale"])
    assert (step.encoded(weight()).codebook["scale"] > 0).all()


@pytest.mark.parametrize(("bits", "grid"), [(1, "midrise"), (2, "full"), (2, "restricted")])
def test_training_lowers_the_error_of_the_step(bits, grid):
    values = weight()
    step = make(LSQ, values, bits, grid, "tensor")
    with torch.no_grad():
        step.scale.mul_(3)
    errors = []
    optimizer = torch.optim.SGD([step.scale], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        error = (step(values) - values).square().sum()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(GRIDS),
    st.sampled_from(GRAINS),
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.sampled_from([0.0, 1.0, -1e-20, 1e20]),
)
def test_constant_weights_of_any_shape_train_and_encode(case, grain, shape, value):
    bits, grid = case
    values = torch.full(shape, value)
    step = make(LSQ, values, bits, grid, grain)
    result, grad, learned = run(step, values, torch.ones(shape))
    assert torch.equal(decode(step.encoded(values)), result)
    for tensor in (result, grad, learned["scale"]):
        assert tensor.isfinite().all()
    if value == 0 and grid != "midrise":
        assert not result.any()


def test_an_output_last_weight_is_quantized_with_its_outputs_first():
    flat = weight().flatten(1)
    usual, transposed = make(LSQ, flat), make(LSQ, flat.T.contiguous(), transpose=True)
    torch.testing.assert_close(transposed(flat.T.contiguous()), usual(flat).T)
    assert torch.equal(transposed.eval()(flat.T.contiguous()), transposed.train()(flat.T.contiguous()))


def test_before_the_start_the_weight_passes_through():
    step = LSQ(weight(), CodecSettings("uniform", 2, grid="full"), False, "w")
    values = weight()
    assert step(values) is values
    assert step.eval()(values) is values


def test_a_broken_weight_and_an_affine_grid_are_refused():
    values = weight()
    values[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.weight.*NaN"):
        make(LSQ, values, 2, "full")
    with pytest.raises(ValueError, match=r"w has grid=none, but a zero point.*LSQ.*symmetric=True"):
        LSQ(weight(), CodecSettings("uniform", 2, symmetric=False), False, "w")


def quantizer(bits=2):
    step = LSQInputs(ActivationSettings(bits, "lsq"), by_token=False).train()
    step.active = True
    return step


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_inputs_and_their_gradients_are_those_of_the_formula(bits, signed):
    inputs = 3 * sample(4, 2, 5)
    inputs = (inputs if signed else inputs.relu()).requires_grad_()
    upstream, step = sample(4, 2, 5, seed=1), quantizer(bits)
    (step(inputs) * upstream).sum().backward()
    half = 2 ** (bits - 1)
    q_n, q_p = (half, half - 1) if signed else (0, 2 * half - 1)
    scale = 2 * inputs.detach().abs().mean().item() / math.sqrt(q_p)
    assert step.scale.item() == pytest.approx(scale)
    assert step.offset.item() == half * signed
    exact = inputs.detach().double() / step.scale.item()
    level = exact.clamp(-q_n, q_p).round()
    inside = (exact >= -q_n) & (exact <= q_p)
    torch.testing.assert_close(step(inputs).detach().double(), level * step.scale.item())
    torch.testing.assert_close(inputs.grad, upstream * inside)
    of_step = (upstream.double() * torch.where(inside, level - exact, level)).sum() / math.sqrt(10 * q_p)
    torch.testing.assert_close(step.scale.grad.double(), of_step[None], rtol=1e-4, atol=1e-5)


def test_inputs_are_quantized_alike_in_training_and_evaluation_and_after_a_first_batch():
    inputs, step = sample(4, 9), quantizer()
    trained = step(inputs)
    step(100 * inputs)
    assert torch.equal(step(inputs), trained)
    assert torch.equal(step.eval()(inputs), trained)
    other = quantizer().eval()
    with pytest.raises(ValueError, match="train with them first"):
        other(inputs)
    other.load_state_dict(step.state_dict())
    assert torch.equal(other(inputs), trained)


@pytest.mark.parametrize("value", [0.0, 2.0, -2.0])
def test_a_constant_first_batch_has_a_step(value):
    step = quantizer()
    inputs = torch.full((3, 4), value).requires_grad_()
    step(inputs).sum().backward()
    assert step.scale > 0
    assert step.scale.grad.isfinite().all()
    assert step(inputs).isfinite().all()
