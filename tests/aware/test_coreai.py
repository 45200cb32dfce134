"""DKM as coreai-opt's training strategy, through its own palettizer."""

import pytest
import torch
from torch import nn

from hf_r2.aware import register_coreai_strategy


def test_without_coreai_opt_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "coreai_opt.palettization.spec.training_strategy", None)
    with pytest.raises(ImportError, match=r'pip install "hf_r2\[coreai\]"'):
        register_coreai_strategy()


@pytest.mark.parametrize(("bits", "cluster_dim"), [(1, 1), (2, 1), (4, 2)])
def test_its_palettizer_trains_weights_and_ends_with_few_values(bits, cluster_dim):
    palettization = pytest.importorskip("coreai_opt.palettization")
    spec_class = register_coreai_strategy()
    assert register_coreai_strategy() is spec_class
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    spec = palettization.PalettizationSpec(
        n_bits=bits, cluster_dim=cluster_dim, training_strategy_spec=spec_class(temperature=0.05)
    )
    settings = palettization.ModuleKMeansPalettizerConfig(
        op_state_spec={"weight": spec}, enable_fast_kmeans_mode=cluster_dim == 1
    )
    palettizer = palettization.KMeansPalettizer(model, palettization.KMeansPalettizerConfig(global_config=settings))
    inputs = torch.randn(64, 16)
    prepared = palettizer.prepare((inputs,))
    targets = inputs @ torch.randn(16, 8) / 4
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    losses = []
    with palettizer.training_mode():
        for _ in range(60):
            optimizer.zero_grad()
            loss = (prepared(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            palettizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    for name, module in prepared.named_modules():
        if hasattr(module, "parametrizations"):
            values = module.eval().weight.detach()
            assert len(values.unique()) <= 2**bits * cluster_dim, name
