"""Settings that must be in place before the first Hugging Face or torch import."""

import atexit
import os
import shutil
import socket
import tempfile

import pytest

hub_address = socket.socket()
hub_address.bind(("127.0.0.1", 0))
home = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, home, ignore_errors=True)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest runs several processes; each with all cores would only slow the others
# No test reaches the real Hub, nor reads a user's token or cache; tests/hub/ serves a Hub at this address
os.environ["HF_ENDPOINT"] = "http://{}:{}".format(*hub_address.getsockname())
os.environ["HF_HOME"] = home
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
for variable in ("HF_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_CACHE"):
    os.environ.pop(variable, None)

import torch  # noqa: E402, once the number of threads is set

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are run on the CPU, by Triton's interpreter


@pytest.fixture
def interpreted_kernels(monkeypatch):
    """Let the kernels for a device, interpreted, make the passes over weights on a CPU."""
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("the kernels are run on the device here, in tests/test_cuda.py")
    pytest.importorskip("triton")
    from hf_r2 import stacking

    monkeypatch.setattr(stacking, "_on_cpu", lambda weight: False)
    monkeypatch.setattr(stacking, "can_be_tiled", lambda tensor: tensor.dtype != torch.float64)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    """Call a function with another default dtype."""

    def call(function, *args):
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            return function(*args)
        finally:
            torch.set_default_dtype(before)

    return call


@pytest.fixture(scope="session")
def hub_socket():
    """The address that the client believes to be the Hub's, held from the start so that no other process takes it."""
    return hub_address
