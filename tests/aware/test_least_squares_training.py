import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_r2.aware import LeastSquares
from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.codecs.binary_bases import warm_two

BASES = [(1, "optimal"), (2, "optimal"), (3, "optimal"), (2, "ternary"), (4, "greedy")]


def make(weight, bits=2, grain="channel", basis="optimal", transpose=False):
    step = LeastSquares(weight, CodecSettings("least_squares", bits, grain, basis=basis), transpose, "layer.weight")
    step.start(weight)
    return step


@pytest.fixture
def weight():
    return 0.05 * torch.randn(24, 30, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "basis"), BASES)
@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
def test_training_computes_with_the_bases_of_the_latent_weight_and_passes_the_gradient_on(weight, bits, basis, grain):
    latent = weight.clone().requires_grad_()
    step = make(weight, bits, grain, basis)
    result = step(latent)
    # Where a sweep begins at the optimum, it ends there
    torch.testing.assert_close(result.detach(), decode(encode(weight, step.settings)), rtol=1e-5, atol=1e-7)
    upstream = torch.randn(24, 30, generator=torch.Generator().manual_seed(1))
    (result * upstream).sum().backward()
    assert torch.equal(latent.grad, upstream)


def test_two_bits_sweep_once_a_step(weight):
    step = make(weight)
    before = step.basis.clone()
    moved = (1.5 * weight + 0.01).requires_grad_()
    step(moved).sum().backward()
    assert torch.equal(step.basis, warm_two(moved.detach(), before))


def test_many_sweeps_follow_the_optimum(weight):
    step, moved = make(weight), 1.5 * weight + 0.01
    for _ in range(30):
        step(moved.clone().requires_grad_()).sum().backward()
    optimum = decode(encode(moved, step.settings))
    error, least = ((step(moved) - moved).square().sum().item(), (optimum - moved).square().sum().item())
    assert least <= error * (1 + 1e-6)
    assert error <= 1.05 * least


@pytest.mark.parametrize(("bits", "basis"), BASES)
def test_evaluation_computes_what_is_encoded_and_changes_nothing(weight, bits, basis):
    step = make(weight, bits, basis=basis).eval()
    before = step.basis.clone()
    moved = weight + 0.01
    assert torch.equal(step(moved), decode(encode(moved, step.settings)))
    assert torch.equal(step.basis, before)


def test_an_output_last_weight_is_compressed_with_its_outputs_first(weight):
    usual, transposed = make(weight), make(weight.T.contiguous(), transpose=True)
    assert torch.equal(transposed(weight.T.contiguous()), usual(weight).T)
    assert torch.equal(transposed.eval()(weight.T.contiguous()), usual.eval()(weight).T)


def test_before_the_start_the_weight_passes_through(weight):
    step = LeastSquares(weight, CodecSettings("least_squares", 1), False, "w")
    assert step(weight) is weight
    assert step.eval()(weight) is weight


def test_a_repeated_forward_pass_computes_the_same(weight):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent, self.step = nn.Parameter(1.5 * weight), make(weight)

        def forward(self, inputs):
            return inputs @ self.step(self.latent).T

    plain, repeated = Layer(), Layer()
    inputs = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        plain(inputs).square().sum().backward()
        checkpoint(repeated, inputs, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.step.basis, repeated.step.basis)
    assert torch.equal(plain.latent.grad, repeated.latent.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_solved_in_float32(weight, dtype):
    step = make(weight.to(dtype))
    result = step(weight.to(dtype).requires_grad_())
    assert result.dtype == dtype
    assert step.basis.dtype == torch.float32
    torch.testing.assert_close(result.detach(), decode(encode(weight.to(dtype), step.settings)))


def test_a_broken_weight_is_named(weight):
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.weight"):
        make(weight)


def test_a_copy_trains_on_its_own(weight):
    step = make(weight)
    other = copy.deepcopy(step)
    other(2 * weight.requires_grad_()).sum().backward()
    assert not torch.equal(other.basis, step.basis)
