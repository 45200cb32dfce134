"""The same results on a CUDA device as on the CPU."""

import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig, R2Trainer, R2TrainingArguments, RangeLoss, decode, encode
from hf_r2.codecs import CodecSettings
from hf_r2.losses import RANGE_LOSSES

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


@pytest.mark.parametrize("kind", RANGE_LOSSES)
@pytest.mark.parametrize("grain", ["tensor", "channel", 7])
def test_range_losses_and_gradients_are_the_same(kind, grain):
    results = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        loss = RangeLoss(model, kind, grain)()
        loss.backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        results.append((loss.detach().cpu(), gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


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
