"""A Hub on loopback, at the address that tests/conftest.py gave to the client before it was imported."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import hub_routes  # noqa: F401 (registers the calls)
import hub_upload  # noqa: F401 (registers the calls)
import pytest
import torch
from hub_server import LoopbackHub, User
from huggingface_hub import HfApi, constants
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.report import render_card


@pytest.fixture(scope="session")
def server(tmp_path_factory, hub_socket):
    assert os.environ["HF_ENDPOINT"] == constants.ENDPOINT  # the client reads it when it is imported
    with LoopbackHub(tmp_path_factory.mktemp("loopback-hub"), hub_socket) as server:
        server.users |= {"hf_alice": User("alice"), "hf_bob": User("bob"), "hf_reader": User("rita", role="read")}
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """A Hub without repositories, alice logged in, weights by Git LFS."""
    server.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    yield server
    assert not [request for request in server.requests if request["face"] == "storage" and request["with_token"]]
    assert not [request["error"] for request in server.requests if "error" in request]


@pytest.fixture(params=["lfs", "xet", "regular"])
def transport(request, hub, monkeypatch):
    """How weights travel: Git LFS, the Xet protocol (what users get), or inside the commit."""
    hub.transport = request.param
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def fresh_process(hub, tmp_path):
    """Run a command in a process of its own, with an empty cache."""

    def run(*command, check=True):
        home = tempfile.mkdtemp(prefix="home-", dir=tmp_path)
        variables = {"HF_HOME": home, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_VERBOSITY": "error"}
        variables["HF_HUB_DISABLE_XET"] = "1" if hub.transport == "lfs" else "0"
        command = [str(part) for part in command]
        return subprocess.run(
            command, env={**os.environ, **variables}, check=check, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """A small classifier of digits, compressed, with processor and card; not to be changed."""
    folder = tmp_path_factory.mktemp("compressed")
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(folder / "digits-float")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "digits-float")
    target = folder / "digits-2bit"
    R2Quantizer.from_pretrained(folder / "digits-float").quantize(target, R2QuantizationConfig("palette", bits=2))
    render_card(target)
    return target


@pytest.fixture
def checkpoint(compressed, tmp_path):
    """A copy of the compressed classifier."""
    return Path(shutil.copytree(compressed, tmp_path / compressed.name))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
