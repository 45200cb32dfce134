import pytest
import torch
from torch import nn

from hf_r2.refine import REFINEMENTS, batch_norms, reestimate_batch_norm


class TwoLayers(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.first_norm = nn.BatchNorm2d(3, momentum=momentum)
        self.second = nn.Conv2d(3, 4, 1)
        self.second_norm = nn.BatchNorm2d(4, momentum=0.3)
        self.dropout = nn.Dropout(0.9)

    def forward(self, pixel_values, scale=None):
        hidden = torch.relu(self.first_norm(self.first(pixel_values)))
        hidden = self.dropout(hidden)
        if scale is not None:
            hidden = hidden * scale
        return self.second_norm(self.second(hidden))


def make_model(**options):
    torch.manual_seed(0)
    model = TwoLayers(**options)
    for norm in batch_norms(model):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 1, 2)
        norm.num_batches_tracked += 7
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    return model.eval()


def make_batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(4 + size, 2, 6, 6, generator=generator) * (1 + size) + size}
        for size in range(count)
    ]


def channel_statistics(activations):
    """Mean and unbiased variance of each channel, in float64."""
    channels = activations.double().transpose(0, 1).flatten(1)
    mean = channels.mean(dim=1)
    variance = (channels - mean[:, None]).square().sum(dim=1) / (channels.shape[1] - 1)
    return mean, variance


def normalised_by_its_own_batch(activations, norm):
    mean = activations.mean(dim=(0, 2, 3), keepdim=True)
    variance = (activations - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    return (activations - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


@torch.no_grad()
def expected_statistics(model, batches):
    """Averages over batches, each layer fed by hand with the batch-normalised output of the one before."""
    seen = {"first_norm": [], "second_norm": []}
    for batch in batches:
        first = model.first(batch["pixel_values"])
        seen["first_norm"].append(channel_statistics(first))
        second = model.second(torch.relu(normalised_by_its_own_batch(first, model.first_norm)))
        seen["second_norm"].append(channel_statistics(second))
    return {
        name: [torch.stack(statistic).mean(dim=0) for statistic in zip(*per_batch, strict=True)]
        for name, per_batch in seen.items()
    }


def test_statistics_are_averages_of_the_batches_mean_and_unbiased_variance():
    model, batches = make_model(), make_batches()
    expected = expected_statistics(model, batches)
    reestimate_batch_norm(model, batches)
    for name, (mean, variance) in expected.items():
        norm = getattr(model, name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-5)
        assert norm.num_batches_tracked == len(batches)


def test_hooks_see_what_the_statistics_describe():
    model, batches = make_model(), make_batches()
    seen = {"first_norm": [], "second_norm": []}
    hooks = [
        getattr(model, name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(channel_statistics(inputs[0]))
        )
        for name in seen
    ]
    reestimate_batch_norm(model, batches)
    for hook in hooks:
        hook.remove()
    for name, per_batch in seen.items():
        assert len(per_batch) == len(batches)
        mean, variance = (torch.stack(statistic).mean(dim=0) for statistic in zip(*per_batch, strict=True))
        torch.testing.assert_close(getattr(model, name).running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(getattr(model, name).running_var.double(), variance, rtol=1e-5, atol=1e-5)


def test_the_old_statistics_and_momenta_have_no_influence():
    model, other = make_model(), make_model(momentum=0.9)
    other.first_norm.running_mean += 100
    for each in (model, other):
        reestimate_batch_norm(each, make_batches())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name))


def test_no_weight_changes():
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reestimate_batch_norm(model, make_batches())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_momenta_and_evaluation_mode_are_restored(training):
    model = make_model().train(training)
    reestimate_batch_norm(model, make_batches())
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.3]
    assert not any(module.training for module in model.modules())


def test_momenta_and_evaluation_mode_are_restored_when_a_batch_fails():
    model = make_model()
    batches = [*make_batches(2), {"pixel_values": torch.zeros(2, 5, 6, 6)}]
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, batches)
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.3]
    assert not any(module.training for module in model.modules())


def test_momenta_and_evaluation_mode_are_restored_when_the_data_fails():
    def broken():
        yield from make_batches(1)
        raise OSError("disk gone")

    model = make_model()
    with pytest.raises(OSError, match="disk gone"):
        reestimate_batch_norm(model, broken())
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.3]
    assert not any(module.training for module in model.modules())


def test_batches_are_keyword_arguments_and_may_come_from_a_generator():
    model, listed = make_model(), make_model()
    batches = [{**batch, "scale": torch.tensor(2.0)} for batch in make_batches()]
    reestimate_batch_norm(listed, batches)
    reestimate_batch_norm(model, (batch for batch in batches))
    plain = make_model()
    reestimate_batch_norm(plain, make_batches())
    assert torch.equal(model.second_norm.running_mean, listed.second_norm.running_mean)
    assert not torch.equal(model.second_norm.running_mean, plain.second_norm.running_mean)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="Linear has no batch-norm layer; remove 'batch_norm' from refine"):
        reestimate_batch_norm(nn.Linear(2, 2), make_batches())


def test_layers_that_keep_no_statistics_do_not_count():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2), nn.GroupNorm(1, 2))
    assert batch_norms(model) == []
    with pytest.raises(ValueError, match="no batch-norm layer"):
        reestimate_batch_norm(model, make_batches())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norms_of_every_dimension_are_found(layer):
    norm = layer(2)
    assert batch_norms(nn.Sequential(nn.Identity(), nn.Sequential(norm))) == [norm]


def test_no_batches_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="needs calibration data; give some or remove 'batch_norm' from refine"):
        reestimate_batch_norm(model, [])
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.3]
    assert not any(module.training for module in model.modules())


def test_no_batches_leave_the_old_statistics_in_place():
    model = make_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ValueError):
        reestimate_batch_norm(model, iter(()))
    for name, buffer in before.items():
        assert torch.equal(model.get_buffer(name), buffer)


def test_the_refinement_is_registered_under_its_name():
    assert "batch_norm" in REFINEMENTS
