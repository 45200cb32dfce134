"""The benchmark of post-training steps runs, and its README says what it measured."""

import pytest
from benchmarks import measuring
from benchmarks import refine as benchmark


@pytest.fixture(scope="module")
def result():
    return benchmark.measure(["none", "bias_correction"], images=8, threads=1)


def test_every_step_has_figures(result):
    assert [row["step"] for row in result["rows"]] == ["none", "bias_correction"]
    assert all(row["seconds"] > 0 and row["bytes"] >= 0 for row in result["rows"])


def test_the_largest_layer_is_that_of_the_widest_maps():
    # of 16 channels in and out, after the pooling of the stem, or the stem's own output at 16 × 16
    stem = 3 * 32 * 32 + 16 * 16 * 16
    assert benchmark.largest_layer_bytes(benchmark.build(), 10) == 10 * 4 * stem


def test_the_table_says_which_bars_are_met(result):
    rows = [{**row, "bar": bar} for row, bar in zip(result["rows"], (0, 1e9), strict=True)]
    lines = benchmark.table(rows, result["layer_bytes"]).splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == ["missed", "met"]


def test_rendering_replaces_what_is_between_the_markers(result, tmp_path):
    measuring.save(result, tmp_path / "refine-cpu-1.json")
    readme = f"before\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\nafter\n"
    assert benchmark.render_readme(readme, tmp_path) == readme.replace("old", benchmark.render(result))


def test_readme_table_is_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
