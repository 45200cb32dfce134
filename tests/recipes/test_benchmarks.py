"""The benchmark of the range losses runs, and its README says what it measured."""

import math

import pytest
import torch
from benchmarks import range_loss as benchmark
from transformers import ResNetConfig, ResNetForImageClassification

RESULTS = sorted((benchmark.HERE / "results").glob("range_loss-*.json"))


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=64))
    with torch.compiler.set_stance("force_eager"):
        return benchmark.measure(model, batch, repetitions=2, bars={"tail": 1e9, "kurtosis": 0})


def test_every_variant_has_finite_figures(measured):
    projections = [benchmark.CLIP, benchmark.FEW, benchmark.STEADY, benchmark.FUSED]
    names = [name for name, *_ in benchmark.LOSSES] + projections
    assert [row["variant"] for row in measured["rows"]] == names
    assert set(benchmark.BARS) <= set(names)
    for row in measured["rows"]:
        figures = [value for key, value in row.items() if key not in ("variant", "bar_percent")]
        assert len(figures) == 6
        assert all(math.isfinite(figure) and figure >= 0 for figure in figures), row


def test_gradients_are_those_of_float64_autograd(measured):
    for row in measured["rows"]:
        # Plain autograd in float32 is what it is, and rounding is much of what a projection changes by a little
        if not row["variant"].endswith("autograd"):
            assert row["gradient_error"] <= 2e-5, row


def test_table_says_which_bars_are_met(measured):
    lines = benchmark.table(measured["rows"]).splitlines()
    verdicts = {cells[1].strip(): cells[3].strip() for cells in (line.split("|") for line in lines)}
    assert (verdicts["tail"], verdicts["kurtosis"], verdicts["l_inf tensor"]) == ("met", "missed", "")


def test_peak_memory_counts_what_is_held_at_a_time():
    weight = torch.ones(1000, 1000)

    def one_after_another():
        weight.clone()
        weight.clone()

    assert benchmark.extra_bytes(one_after_another, cuda=False) == pytest.approx(weight.nbytes, rel=1e-3)
    assert benchmark.extra_bytes(lambda: weight.abs().add(1), cuda=False) == pytest.approx(2 * weight.nbytes, rel=1e-3)
    assert benchmark.extra_bytes(lambda: weight.add_(1), cuda=False) < 1000


@pytest.mark.skipif(not RESULTS, reason="no results yet")
def test_readme_tables_are_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert text == benchmark.render_readme(text, benchmark.HERE / "results")
