"""The data sets made of the standard library's sources."""

import os
import platform
import re
from collections import Counter

import pytest
from datasets import ClassLabel, config

from hf_r2.evaluation import LabelledData
from hf_r2.evaluation import standard_library as library
from hf_r2.evaluation.data import load_splits, take_split
from hf_r2.evaluation.standard_library import (
    BRACKET_DEPTH,
    DEPTHS,
    LABELLED_PACKAGES,
    PACKAGES,
    SOURCES,
    STANDARD_LIBRARY,
)

VERSION = platform.python_version()
every_data_set = pytest.mark.parametrize("name", STANDARD_LIBRARY)


@pytest.fixture(scope="module")
def splits():
    return {name: load_splits(name) for name in STANDARD_LIBRARY}


@pytest.fixture
def few_files(tmp_path, monkeypatch):
    """A cache of its own, and a standard library of every fifth file."""
    files = list(library._files())[::5]
    monkeypatch.setattr(library, "_files", lambda: iter(files))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return files


@every_data_set
def test_no_file_and_no_text_is_in_two_splits(splits, name):
    parts = splits[name]
    assert list(parts) == ["train", "validation", "test"]
    for column in ("file", "text"):
        values = [set(split[column][:]) for split in parts.values()]
        assert all(values)
        assert len(set.union(*values)) == sum(map(len, values))
    texts = [text for split in parts.values() for text in split["text"][:]]
    assert len(set(texts)) == len(texts)


@every_data_set
def test_what_distributions_leave_out_or_change_is_not_there(splits, name):
    files = {file for split in splits[name].values() for file in split["file"][:]}
    assert len(files) > (80 if name == PACKAGES else 250)
    assert not [file for file in files if re.search(r"(^|/)(tests?|__pycache__|site-packages)/", file)]
    assert not [
        file for file in files if file.startswith(("_", "idlelib", "tkinter", "lib2to3", "distutils", "turtle"))
    ]
    assert not files & {"site.py", "sysconfig.py"}


def test_sources_are_the_files_whole(splits):
    train = splits[SOURCES]["train"]
    row = train[len(train) // 2]
    with open(os.path.join(os.path.dirname(os.__file__), row["file"]), encoding="utf-8") as file:
        assert row["text"] == file.read()


def test_depths_are_those_of_brackets_counted_by_hand(splits):
    """Where no word holds a bracket inside quotes, counting characters is a second way to the same answer."""
    counted = 0
    for split in splits[BRACKET_DEPTH].values():
        for text, label in zip(split["text"][:], split["label"][:], strict=True):
            assert text.count("[MASK]") == 1
            if '"' in text or "'" in text:
                continue
            before = text.partition("[MASK]")[0]
            depth = sum(before.count(bracket) for bracket in "([{") - sum(before.count(bracket) for bracket in ")]}")
            assert label == min(depth, 2), text
            counted += 1
    assert counted > 10_000


@pytest.mark.parametrize(
    ("name", "classes", "largest_share"), [(BRACKET_DEPTH, DEPTHS, 0.4), (PACKAGES, LABELLED_PACKAGES, 0.3)]
)
def test_every_split_has_every_class_and_none_prevails(splits, name, classes, largest_share):
    for split, of_split in splits[name].items():
        assert isinstance(of_split.features["label"], ClassLabel)
        assert of_split.features["label"].names == classes
        counts = Counter(of_split["label"][:])
        assert len(counts) == len(classes), split
        assert max(counts.values()) / len(of_split) < largest_share, split


def test_packages_are_those_of_the_files_and_not_named_in_the_texts(splits):
    masked = 0
    for split in splits[PACKAGES].values():
        for text, label, file in zip(split["text"][:], split["label"][:], split["file"][:], strict=True):
            assert file.startswith(LABELLED_PACKAGES[label] + "/")
            assert not [package for package in LABELLED_PACKAGES if package in text.lower()], text
            assert len(text.split()) == 32
            masked += "[MASK]" in text
    assert masked > 100


def test_no_line_of_code_is_in_two_pieces(splits):
    """Of what is long enough to be told from the words that a line begins or ends with."""
    texts = [text for split in splits[PACKAGES].values() for text in split["text"][:]]
    definitions = Counter(found for text in texts for found in re.findall(r"\bdef \w+ \([^()]{20,}\) :", text))
    assert len(definitions) > 300
    assert max(definitions.values()) == 1


def test_pieces_are_told_by_a_small_example(monkeypatch):
    monkeypatch.setattr(library, "_WORDS_OF_A_PIECE", 4)
    seen: set[str] = set()
    source = '# A license\nimport xml.sax\n\ndef parse():\n    """Parse  XML\n    slowly."""\n    return xmlns\n'
    assert list(library._pieces(source, seen)) == [
        "import [MASK] . sax",
        "def parse ( )",
        ': """Parse [MASK] slowly."""',
    ]
    assert list(library._pieces("import xml.sax\nfrom asyncio import run\n", seen)) == ["from [MASK] import run"]


@every_data_set
def test_the_same_data_are_made_every_time(few_files, tmp_path, monkeypatch, name):
    first = load_splits(name)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "another"))
    again = load_splits(name)
    assert [split._fingerprint for split in first.values()] == [split._fingerprint for split in again.values()]
    assert all(first[split].to_dict() == again[split].to_dict() for split in first)


def test_what_is_made_is_kept(few_files, monkeypatch):
    first = load_splits(SOURCES)
    monkeypatch.setattr(library, "_files", lambda: pytest.fail("made again"))
    assert load_splits(SOURCES)["train"].to_dict() == first["train"].to_dict()


def test_an_interrupted_first_load_leaves_nothing(few_files, tmp_path, monkeypatch):
    def interrupted():
        yield few_files[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_splits(SOURCES)
    assert not list(tmp_path.rglob("*.arrow"))


def test_the_version_of_python_is_the_revision():
    data = LabelledData(BRACKET_DEPTH, "test", ("text",))
    facts = data.facts()
    assert (facts["name"], facts["hub_name"], facts["revision"]) == (BRACKET_DEPTH, None, VERSION)
    for name in (None, BRACKET_DEPTH):
        assert LabelledData.from_facts(facts, name) == LabelledData(BRACKET_DEPTH, "test", ("text",), revision=VERSION)


@every_data_set
def test_another_python_is_refused(name):
    data = LabelledData.from_facts({**LabelledData(name).facts(), "revision": "3.9.1"})
    with pytest.raises(ValueError, match=rf"of Python 3\.9\.1 .* this is Python {re.escape(VERSION)}: run with"):
        data.load()


def test_a_standard_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no sources of .*'asyncio'"):
        load_splits(SOURCES)
    assert not (tmp_path / "cache").exists()


@every_data_set
def test_a_random_part_of_the_training_data_is_refused_for_validation(splits, name):
    with pytest.raises(ValueError, match=r"is split by file: .* is 'validation'"):
        take_split(splits[name], "validation_from_train", "label", name)
    assert len(take_split(splits[name], "validation", "label", name)) > 0


def test_texts_are_classified_by_name():
    data = LabelledData(BRACKET_DEPTH, inputs=("text",)).load()
    assert len(data) > 2000
    with pytest.raises(ValueError, match="has no column 'label'"):
        LabelledData(SOURCES, inputs=("text",)).load()
