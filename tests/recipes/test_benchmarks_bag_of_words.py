"""The baseline of the text recipes runs, and its README says what it measured."""

import json

import pytest
from benchmarks import bag_of_words as benchmark
from benchmarks import measuring


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{('good', 'bad')[index % 2]} thing", "label": index % 2} for index in range(20)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {**benchmark.measure(str(folder), ["words"]), "data": "reviews"}


def test_words_that_tell_are_told(result):
    assert result["rows"][0]["test"] == 1.0
    assert result["examples"] == {"train": 20, "validation": 20, "test": 20}


def test_rendering_replaces_what_is_between_the_markers(result, tmp_path):
    measuring.save(result, tmp_path / "bag-of-words-reviews.json")
    readme = f"before\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\nafter\n"
    assert benchmark.render_readme(readme, tmp_path) == readme.replace("old", benchmark.render(result))


def test_readme_table_is_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
