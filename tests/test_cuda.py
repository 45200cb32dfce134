"""The same results on a CUDA device as on the CPU."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

from hf_r2 import R2QuantizationConfig, R2Trainer, R2TrainingArguments, RangeLoss, RangeProjection, decode, encode
from hf_r2.aware.soft_kmeans import soft_kmeans
from hf_r2.codecs import CodecSettings
from hf_r2.losses import RANGE_LOSSES
from hf_r2.projection import PROJECTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = [
    CodecSettings("uniform", 2, "tensor"),
    CodecSettings("uniform", 4, 50, symmetric=False),
    CodecSettings("uniform", 8, "channel", grid="midrise"),
    CodecSettings("palette", 1, "tensor"),
    CodecSettings("palette", 4, "channel"),
    CodecSettings("palette", 4, "tensor", cluster_dim=3),
    CodecSettings("least_squares", 2, "channel"),
    CodecSettings("least_squares", 3, 10),
]


def make_model():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_decoded_weights_are_the_same(settings, dtype):
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_cpu, on_cuda = encode(weight, settings), encode(weight.cuda(), settings)
    assert torch.equal(on_cpu.codes, on_cuda.codes.cpu())
    assert torch.equal(decode(on_cpu), decode(on_cuda).cpu())


def odd_weights(dtype=torch.float32):
    """Weights of one and of many tiles, of groups of all widths, with ties and zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(300, 70), Conv1D(33, 100), nn.Conv2d(8, 33, 3), nn.Linear(5000, 40), nn.Linear(12, 8), nn.Linear(7, 5)
    )
    with torch.no_grad():
        model[0].weight[3, 5] = model[0].weight[60, 299] = -1.5 * model[0].weight.abs().max()
        model[3].weight[7, 4096:].zero_()
        model[4].weight[2].zero_()
    return model.to(dtype)


def restricted(device, dtype, kind, grain, strength):
    """Values and gradients of a range loss, or the weights a projection leaves, in steps that move the weights."""
    model = odd_weights(dtype).to(device)
    found, kept = [], []
    if kind in PROJECTIONS:
        projection = RangeProjection(model, kind, grain)
        for step in range(5):
            move(model, step)
            projection.step(strength * (1 + step))
            found += [parameter.detach().cpu().clone() for parameter in model.parameters()]
        return found
    reduction = "sum" if kind == "margin sum" else "max"
    loss = RangeLoss(model, kind.removesuffix(" sum"), grain, margin_reduction=reduction)
    for margins in loss.learnable.values() if loss.kind == "margin" else ():
        margins.data.mul_(0.7)
    for step in range(5):
        move(model, step)
        value = loss.measure(strength * (1 + step))
        loss.accumulate_grad_(3.0 + step)
        gradients = [p.grad for p in (*model.parameters(), *loss.parameters()) if p.grad is not None]
        found += [value.cpu(), *(gradient.cpu() for gradient in gradients)]
        kept += gradients  # so that the next ones lie elsewhere
        model.zero_grad()
        loss.zero_grad()
    return found


@torch.no_grad()
def move(model, step):
    """Scale the weights, so that ties stay ties."""
    for parameter in model.parameters():
        parameter.mul_(1 + 0.25 * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grain", ["tensor", "channel", 4, 64])
@pytest.mark.parametrize("kind", [*RANGE_LOSSES, "margin sum", *PROJECTIONS])
def test_ranges_are_restricted_the_same(kind, grain, dtype):
    if (kind, dtype) == ("tail", torch.bfloat16):
        pytest.skip("elements tie for the last place in a tail, and a device shares it among them")
    expected, found = (restricted(device, dtype, kind, grain, 0.4) for device in ("cpu", "cuda"))
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def assert_near(found, expected, rounding):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=10 * rounding, atol=rounding * scale)


@pytest.mark.parametrize("grain", ["tensor", "channel"])
@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_the_loss_by_autograd_is_the_same(kind, grain):
    results = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        loss = RangeLoss(model, kind, grain)()
        loss.backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        results.append([loss.detach().cpu(), *gradients])
    for expected, found in zip(*results, strict=True):
        assert_near(found, expected, 2e-5)


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", [*RANGE_LOSSES, *PROJECTIONS])
def test_the_host_does_not_wait_for_the_device_and_little_is_built(kind, no_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, 1000) for n in (300, 700, 1100, 3000, 5000))).cuda()
    weights = sum(layer.weight.nbytes for layer in model)
    restrict = RangeProjection(model, kind) if kind in PROJECTIONS else RangeLoss(model, kind)

    def step():
        if kind in PROJECTIONS:
            restrict.step(0.1)
        else:
            restrict.measure(0.1)
            restrict.accumulate_grad_()

    def built():
        """Most bytes that a step holds beyond what was held before it."""
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - held

    step()  # which makes the gradients
    assert max(built() for _ in range(3)) < 0.05 * weights
    no_waiting()
    assert built() < 0.05 * weights


@pytest.mark.parametrize(("k", "d"), [(2, 1), (16, 1), (4, 2)])
def test_soft_kmeans_and_its_gradient_are_the_same(k, d):
    generator = torch.Generator().manual_seed(0)
    block, slope = 0.02 * torch.randn(2, 3, 40000, generator=generator)
    centroids = 0.03 * torch.randn(3, k, d, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        weight = block.to(device).requires_grad_()
        soft = soft_kmeans(weight, centroids.to(device).squeeze(2), 0.05, tolerance=0)
        (gradient,) = torch.autograd.grad(soft.weights, weight, slope.to(device))
        results.append([tensor.detach().cpu() for tensor in (*soft, gradient)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 2e-4 * expected.norm()


def test_checkpoint_saved_on_the_cpu_loads_on_the_device_bit_equal(tmp_path):
    make_model().save_pretrained(tmp_path / "float")
    config = R2QuantizationConfig("palette", bits=3, overrides={"classifier.*": {"method": "uniform", "bits": 8}})
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "compressed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "compressed", device_map="cuda")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].cpu(), tensor), name
    loaded.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("compressed", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("kind", ["l_inf", "margin", "soft_min_max"])
def test_trainer_restricts_the_range_in_mixed_precision(tmp_path, kind, precision):
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 3} for index in range(64)]
    arguments = R2TrainingArguments(
        str(tmp_path), r2_loss=kind, r2_strength=1.0, optim="sgd", learning_rate=0.01, max_steps=20, logging_steps=1,
        per_device_train_batch_size=16, save_strategy="no", report_to="none", disable_tqdm=True, **precision,
    )  # fmt: skip
    trainer = R2Trainer(make_model(), arguments, train_dataset=data)
    start = [parameter.detach().clone() for parameter in trainer.range_loss.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "r2_loss" in entry]
    assert logs[-1]["r2_loss"] < logs[0]["r2_loss"]
    for before, after in zip(start, trainer.range_loss.parameters(), strict=True):
        assert torch.isfinite(after).all()
        assert (after - before).abs().max() < 1  # an unscaled fp16 gradient would be 65536 times too large
