"""The benchmark of exports runs, and its README says what it measured."""

import pytest
from benchmarks import export as benchmark
from benchmarks import measuring

ROWS = [
    {"model": "bert", "weights": "float", "program": "PyTorch", "ms": 20.0, "bytes": 4_000_000, "error": 0.0},
    {"model": "bert", "weights": "uniform, 2 bits", "program": "openvino", "ms": 10.0, "bytes": 500_000, "error": 2e-7},
]


def test_figures_are_ratios_to_float_pytorch():
    cells = [cell.strip() for cell in benchmark.table(ROWS).splitlines()[3].strip("|").split("|")]
    assert cells == ["uniform, 2 bits", "openvino", "10.0", "0.50", "0.50", "8.0", "2e-07"]


@pytest.mark.slow
def test_every_program_has_figures():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    rows = benchmark.measure_model("bert", ["palette, 2 bits"], rounds=1)
    programs = ["PyTorch", "onnxruntime", *benchmark.SESSIONS, "openvino"]
    assert [row["program"] for row in rows] == programs
    assert all(row["ms"] > 0 and row["error"] < 1e-4 for row in rows)
    assert all(row["bytes"] < rows[0]["bytes"] for row in rows[2:])


def test_rendering_replaces_what_is_between_the_markers(tmp_path):
    facts = {**measuring.facts(threads=1), "onnxruntime": "1", "openvino": "2", "rounds": 3}
    result = {**facts, "rows": ROWS}
    measuring.save(result, tmp_path / "export-cpu-1.json")
    readme = f"before\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\nafter\n"
    assert benchmark.render_readme(readme, tmp_path) == readme.replace("old", benchmark.render(result))


def test_readme_table_is_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
