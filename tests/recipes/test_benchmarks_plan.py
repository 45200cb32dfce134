"""The benchmark of plans runs, and its README says what it measured."""

import itertools
import math

import pytest
from benchmarks import measuring
from benchmarks import plan as benchmark
from benchmarks.plan_models import CASES, DATA, train


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    source = tmp_path_factory.mktemp("plan") / "digits-resnet"
    train(CASES["digits-resnet"], source, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "BITS", (3,))
        measured = benchmark.measure("digits-resnet", source, "uniform", examples=32)
    return {**measuring.facts(1), **measured}


def test_every_choice_has_figures_at_the_bytes_of_uniform_bits(result):
    uniform, *others = result["rows"]
    assert [row["kind"] for row in result["rows"]] == list(benchmark.ROW_NAMES)
    assert set(uniform["settings"].values()) == {3}
    assert all(row["bytes"] <= uniform["bytes"] and row["gap"] == 0 for row in others)
    assert all(others[-1]["calibration"][key] <= uniform["calibration"][key] for key in ("kl", "loss"))
    assert all(math.isfinite(row[key]) for row in result["rows"] for key in ("kl", "loss", "accuracy"))
    assert all(row["excess"] == pytest.approx(row["loss"] - uniform["loss"], abs=1e-9) for row in result["rows"])
    assert set(result["correlations"]) == set(benchmark.PROXIES)


def test_the_table_says_where_a_plan_is_worse_than_uniform_bits(result):
    uniform, plan = result["rows"][0], result["rows"][-1]
    rows = [uniform, *({**plan, "excess": excess, "standard_error": 0.01} for excess in (-0.02, 0.0, 0.001))]
    verdicts = [line.split("|")[3].strip() for line in benchmark.table(rows).splitlines()[2:]]
    assert verdicts == ["", "met", "met", "missed"]


def test_texts_are_windows_of_known_words_by_package():
    parts = DATA["sources"]()
    tokens = parts.train.tensors["input_ids"]
    assert tokens.shape[1] == CASES["bert"].model["max_position_embeddings"]
    assert set(tokens.unique().tolist()) <= set(range(1, CASES["bert"].model["vocab_size"]))
    assert len(set(parts.test.tensors["labels"].tolist())) == CASES["bert"].model["num_labels"]


@pytest.mark.parametrize("name", sorted(DATA))
def test_no_example_is_in_two_parts(name):
    """But for windows that sources repeat, such as licences."""
    parts = DATA[name]()
    seen = [{row.numpy().tobytes() for row in next(iter(part.tensors.values()))} for part in parts]
    shared = [len(first & second) / len(second) for first, second in itertools.combinations(seen, 2)]
    assert max(shared) < 0.01
    assert min(map(len, parts)) > 200


def test_readme_tables_are_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
