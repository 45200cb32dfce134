"""The benchmark of DKM runs, and its README says what it measured."""

import math
from importlib.util import find_spec

import pytest
import torch
from benchmarks import dkm as benchmark
from benchmarks import measuring
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

RESULTS = sorted((measuring.HERE / "results").glob("dkm-*.json"))
TINY = [benchmark.Case(1, (30, 22), width=32), benchmark.Case(2, (25, 25), rows=8, width=32)]
TINY += [benchmark.Case(1, (8, 8), rows=1, width=32), benchmark.Case(2, (6, 6), dim=2, width=32)]
needs_peer = pytest.mark.skipif(not find_spec("coremltools"), reason="coremltools is not installed")


def here(function, *arguments):
    """Do in this process what a side does in its own."""
    return function(*arguments)


@pytest.fixture
def tiny_model(monkeypatch):
    def build(name):
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
        return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=256)), batch

    monkeypatch.setattr(benchmark, "build", build)
    monkeypatch.setattr(benchmark, "BLOCK_MS", 1)


def assert_finite(found, names):
    assert set(found["ms"]) == set(found["bytes"]) == set(names)
    for figures in (found["ms"], found["bytes"]):
        assert all(math.isfinite(figure) and figure > 0 for figure in figures.values()), found
    assert found["rounds"] >= benchmark.LEAST_ROUNDS


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_our_layers_have_finite_figures(case, tiny_model):
    found = benchmark.compare(benchmark.layer_variants(case, here, None), seconds=0.01)
    fused = [benchmark.OURS_FUSED] if case.tables else []
    assert_finite(found, [benchmark.DENSE, benchmark.OURS, *fused, benchmark.OURS_MANY])
    # The gradient of the weight, and beside it little: that is W
    assert found["bytes"][benchmark.DENSE] / (4 * case.width**2) == pytest.approx(1, abs=0.5)
    assert not benchmark._steps


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_our_layers_train_on_soft_weights(case):
    layer = benchmark.random_layer(case.width, case.width)
    start = benchmark.start_centroids(case.bits, case.dim, layer.weight, case.groups)
    assert start.shape == (case.groups, 2**case.bits, case.dim)
    soft = benchmark.SoftWeight(start, benchmark.ITERATIONS)
    before = soft.centroids
    assert not torch.equal(soft(layer.weight), layer.weight)
    assert not torch.equal(soft.centroids, before)
    assert not soft.centroids.requires_grad


def test_whole_models_train_on_attached_weights(tiny_model):
    variants = benchmark.model_variants(2, here, None)
    del variants[benchmark.PEER]
    found = benchmark.compare(variants, seconds=0.01)
    assert_finite(found, [benchmark.DENSE, benchmark.OURS, benchmark.OURS_FUSED])
    assert found["bytes"][benchmark.OURS] > found["bytes"][benchmark.DENSE]


def test_models_with_dense_weights_are_refused(tiny_model):
    def palettize_nothing(model, bits):
        return 0

    with pytest.raises(RuntimeError, match="weights of resnet18 were left dense"):
        benchmark.model_step(2, palettize_nothing)


def test_memory_of_a_layer_counts_its_gradient():
    """What the bar of 3.5 W is set against: one pass over the weight and back holds two copies."""
    weight = nn.Parameter(torch.ones(512, 512))
    upstream = torch.ones(512, 512)

    def step():
        (weight * 2).backward(upstream)
        weight.grad = None

    step()
    assert measuring.extra_bytes(step, cuda=False) == pytest.approx(2 * weight.nbytes, rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("temperature", benchmark.GRADIENT)
def test_our_gradient_is_the_unrolled_one(bits, temperature):
    assert benchmark.gradient_error(bits, temperature, 64, None) <= benchmark.GRADIENT[temperature]


@needs_peer
def test_peer_starts_and_trains_as_ours_does(tiny_model):
    for case in TINY:
        variants = benchmark.layer_variants(case, here, here)
        peers = {name: variant for name, variant in variants.items() if name.startswith(benchmark.PEER)}
        expected = [benchmark.PEER, benchmark.PEER_DEFAULT, benchmark.PEER_BATCH][: 2 if case.rows is None else 3]
        found = benchmark.compare(peers, seconds=0.01)
        assert_finite(found, expected)
        # A layer that coremltools leaves as it is holds little more than its gradient
        assert found["bytes"][benchmark.PEER] / (4 * case.width**2) > 5
    names = ["dense", "ours", "ours, fused", "coremltools"]
    assert_finite(benchmark.compare(benchmark.model_variants(1, here, here), 0.01), names)
    # Far from ours only if it computes something else
    assert benchmark.gradient_error(2, 1e-4, 64, {"prune_threshold": 0.0}) <= 0.01


def layer_result(**changes):
    ms = {"dense": 1.0, "ours": 11.0, "ours, 20 iterations": 16.0, "coremltools": 401.0, "coremltools, defaults": 451.0}
    peaks = dict.fromkeys(ms, 12.0) | {"coremltools": 124.0}
    facts = {"case": "1 bit", "scalar": True, "faster": [30, 45], "w_bytes": 4, "rounds": 3}
    return {**facts, "ms": ms, "bytes": peaks, **changes}


def verdicts(table):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [[cell for cell in line if cell in ("met", "missed")] for line in lines[2:]]


def test_layer_tables_say_which_bars_are_met():
    grouped = layer_result(faster=[8, 8], scalar=False)
    grouped["ms"] = {**grouped["ms"], "ours, fused": 8.0, "coremltools, batch mode": 71.0}
    table = benchmark.speed_table([layer_result(), grouped], threads=1)
    assert verdicts(table) == [["met"], ["missed", "met"]]
    assert verdicts(benchmark.speed_table([layer_result()], threads=2)) == [["missed"]]
    # Without the dense step (401 − 1) / (11 − 1); the faster mode of coremltools counts
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["40.0", "7.0"]
    large = layer_result(bytes={**layer_result()["bytes"], "ours, 20 iterations": 16.0})
    assert verdicts(benchmark.memory_table([layer_result(), large, grouped])) == [
        ["met", "met"],
        ["missed", "met"],
        ["met"],
    ]


def test_model_and_gradient_tables_say_which_bars_are_met():
    ms = {"dense": 100.0, "ours": 155.0, "ours, fused": 145.0, "coremltools": 1200.0}
    models = [{"bits": bits, "rounds": 3, "ms": ms, "bytes": {**ms, "ours": 230.0}} for bits in (2, 4)]
    assert verdicts(benchmark.model_table(models)) == [["missed", "met", "met"], ["met", "met", "met"]]
    errors = {"ours": 3e-4, "coremltools": 1e-3, "coremltools, prune_threshold 0": 4e-4}
    gradients = [{"bits": 2, "temperature": temperature, "errors": errors} for temperature in (1e-4, 1e-5)]
    assert verdicts(benchmark.gradient_table(gradients)) == [["missed"], ["met"]]


def test_the_program_asks_for_its_peer(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .*\[bench\]"):
        benchmark.main([])


@pytest.mark.skipif(not RESULTS, reason="no results yet")
def test_readme_tables_are_rendered_from_the_results():
    text = (measuring.HERE / "README.md").read_text(encoding="utf-8")
    assert text == benchmark.render_readme(text, measuring.HERE / "results")
