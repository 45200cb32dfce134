import pytest
import torch
from checkpoint_models import build, inputs

from hf_r2 import R2QuantizationConfig, attach
from hf_r2.aware.ewgs_delta import hessian_traces, update_deltas


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_traces_of_diagonal_hessians_are_exact_and_of_others_close():
    first, second = sample(5).requires_grad_(), sample(2, 3, seed=1).requires_grad_()
    gradients, traces = hessian_traces(first.pow(3).sum() + 2 * second.square().sum(), [first, second], probes=1)
    torch.testing.assert_close(gradients[0], 3 * first.detach().square())
    torch.testing.assert_close(traces[0], 6 * first.detach().sum())
    assert traces[1].item() == pytest.approx(24)
    matrix = sample(6, 6, seed=2)
    torch.manual_seed(0)
    vector = sample(6, seed=3).requires_grad_()
    _, (trace,) = hessian_traces(vector @ matrix @ vector, [vector], probes=4000)
    assert trace.item() == pytest.approx(2 * matrix.trace().item(), abs=0.5)


@pytest.mark.parametrize("family", ["resnet", "bert"])
def test_every_layer_gets_its_own_delta_and_nothing_else_changes(family):
    config = R2QuantizationConfig(bits=2, aware="ewgs", activations={"method": "ewgs", "bits": 2})
    model = attach(build(family), config).train()
    batch = {**inputs(family), "labels": torch.tensor([0, 2])}
    model(**batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = update_deltas(model, [batch], probes=5)
    assert len(set(found)) > len(found) / 4
    assert min(found) >= 0
    for name, tensor in model.state_dict().items():
        assert name.endswith("delta") or torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**batch).loss.backward()
