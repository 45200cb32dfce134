"""The benchmark of least-squares binary quantization runs, and its README says what it measured."""

import math

import pytest
import torch
from benchmarks import least_squares as benchmark
from benchmarks import measuring


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    shapes = {"one row": benchmark.measure(torch.randn(1, 5000), 2), "rows": benchmark.measure(torch.randn(9, 60), 2)}
    channels = [benchmark.compare_channels(n, 50) for n in (27, 90)]
    return {**measuring.facts(1), "repetitions": 2, "shapes": shapes, "channels": channels}


def test_every_solver_has_finite_figures(result):
    for rows in result["shapes"].values():
        assert [row["variant"] for row in rows][:2] == [benchmark.EXACT, benchmark.WARM]
        assert len({row["variant"] for row in rows}) == 7
        for row in rows:
            figures = [row[key] for key in ("ms", "plain_ms", "error", "plain_error")]
            assert all(math.isfinite(figure) and figure >= 0 for figure in figures), row


def test_plain_forms_find_the_same(result):
    for rows in result["shapes"].values():
        for row in rows:
            if row["variant"] == benchmark.EXACT or row["variant"].endswith("greedy"):
                assert row["error"] == pytest.approx(row["plain_error"], rel=1e-5)
            if row["variant"].endswith("refined"):
                assert row["error"] < row["plain_error"]


def test_our_two_bits_are_the_optimum_and_nothing_is_better(result):
    for channel in result["channels"]:
        assert channel["ratios"]["ours"] == pytest.approx([1, 1], abs=1e-5)
        assert all(mean >= 1 - 1e-6 for mean, _ in channel["ratios"].values())


def test_tables_say_which_bars_are_met(result):
    rows = [{**row, "bar": 0 if row["variant"] == benchmark.WARM else 1e9} for row in result["shapes"]["rows"]]
    verdicts = [line.split("|")[3].strip() for line in benchmark.speed_table(rows).splitlines()[2:]]
    assert verdicts == ["missed", "met", *["missed"] * 5]
    text = benchmark.render(result)
    assert "**one row**" in text
    assert "| ours " in text


def test_rendering_replaces_what_is_between_the_markers(result, tmp_path):
    measuring.save(result, tmp_path / "least_squares-cpu-1.json")
    readme = f"before\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\nafter\n"
    rendered = benchmark.render_readme(readme, tmp_path)
    assert rendered == readme.replace("old", benchmark.render(result))


def test_readme_tables_are_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
