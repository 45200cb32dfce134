"""Text data sets made of what every Python installation ships: the sources of its standard library.

They need no network: they are made at the first load, and then kept in the cache of `datasets`. Sources change with
every release of Python, so its version is their revision. Every file belongs to one split, and no text occurs twice.
"""

import hashlib
import io
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config, load_from_disk
from tqdm.auto import tqdm

from hf_r2.files import atomic_directory

BRACKET_DEPTH = "python-bracket-depth"
PACKAGES = "python-packages"
SOURCES = "python-sources"
STANDARD_LIBRARY = (BRACKET_DEPTH, PACKAGES, SOURCES)
"""Names of the data sets: two to classify, one to model."""

# What every build has: Linux distributions leave out or split off other packages, and write into two of the modules
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "tomllib",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)
_TESTS = {"test", "tests"}
_NOT_EVERYWHERE = {"site.py", "sysconfig.py", "turtle.py"}

MASK = "[MASK]"
DEPTHS = ["0", "1", "2 or more"]
_LONGEST_LINE = 120
_MOST_OF_A_DEPTH = {"train": 10_000, "validation": 1000, "test": 1000}
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_NO_WORDS = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}
_ENDS = {tokenize.NEWLINE, tokenize.ENDMARKER}

# Those with enough text in the files of every split
LABELLED_PACKAGES = ["asyncio", "multiprocessing", "unittest", "urllib", "xml"]
_NAME_OF_A_PACKAGE = re.compile("|".join(LABELLED_PACKAGES), re.IGNORECASE)
_WORDS_OF_A_PIECE = 32
_MOST_OF_A_PACKAGE = {"train": 800, "validation": 100, "test": 200}


def load_standard_library(name: str, revision: str | None = None) -> DatasetDict:
    """Make a data set of the standard library, with the splits `train`, `validation` and `test`.

    `python-bracket-depth` is to classify: a line of code as words between spaces, of which `[MASK]` hides one (`text`),
    and inside how many brackets it stands (`label`, one of three classes). Every line opens a bracket inside another,
    so the words alone do not tell; what is before and behind the mask does, without exception. `python-packages` is to
    classify too: 32 words of code and documentation strings (`text`), without comments, and the package they are from
    (`label`, one of five). `[MASK]` hides the names of the five wherever they stand, in longer words as well; a line
    that occurs again, here or in another file, is left out there. `python-sources` is to model: whole files (`text`).
    All name the `file` that a text is from.

    Args:
        name: one of [`STANDARD_LIBRARY`].
        revision: version of Python that it must be of, such as `3.11.7`; of any without.

    Raises:
        ValueError: for another Python than that of the revision, and an installation without the sources.
    """
    version = platform.python_version()
    if revision not in (None, version):
        raise ValueError(
            f"the data set {name!r} of Python {revision} is made of that Python's own sources, and this is Python "
            f"{version}: run with Python {revision}"
        )
    made_by = _digest(Path(__file__).read_text(encoding="utf-8"))[:16]
    folder = Path(config.HF_DATASETS_CACHE) / "hf_r2" / f"{name}-{version}-{made_by}"
    if not folder.is_dir():
        data = {BRACKET_DEPTH: _bracket_depths, PACKAGES: _packages, SOURCES: _sources}[name]()
        with atomic_directory(folder) as scratch:
            data.save_to_disk(scratch)
    return load_from_disk(folder)


def _files() -> Iterator[tuple[str, str]]:
    """Yield the path below the standard library, and the text, of every source file but tests."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in root.glob("[a-z]*.py") if path.name not in _NOT_EVERYWHERE]
    packages = {package: list((root / package).rglob("*.py")) for package in _PACKAGES}
    missing = [package for package, paths in packages.items() if not paths]
    if missing:
        raise ValueError(f"{root} holds no sources of {missing}: use a Python whose standard library is complete")
    paths = sorted(path.relative_to(root) for path in chain(modules, *packages.values()))
    for path in tqdm(paths, desc="Reading the standard library", unit="file"):
        if _TESTS.isdisjoint(path.parts):
            with tokenize.open(root / path) as file:
                yield path.as_posix(), file.read()


def _split_of(file: str) -> str:
    """Draw a file's split by its path, so that it stays there in every version: 70 % train, 10 % validation."""
    draw = int(_digest(file), 16) % 10
    return "test" if draw < 2 else "validation" if draw < 3 else "train"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sources() -> DatasetDict:
    columns: dict[str, dict[str, list[str]]] = {
        split: {"text": [], "file": []} for split in ("train", "validation", "test")
    }
    seen = set()
    for file, text in _files():
        if text.strip() and text not in seen:
            seen.add(text)
            columns[_split_of(file)]["text"].append(text)
            columns[_split_of(file)]["file"].append(file)
    return DatasetDict({split: Dataset.from_dict(rows) for split, rows in columns.items()})


def _bracket_depths() -> DatasetDict:
    examples: dict[str, tuple[int, str]] = {}
    for file, source in _files():
        for text, depth in _masked_lines(source):
            examples.setdefault(text, (min(depth, len(DEPTHS) - 1), file))
    return _balanced(examples, DEPTHS, _MOST_OF_A_DEPTH)


def _packages() -> DatasetDict:
    examples: dict[str, tuple[int, str]] = {}
    seen: set[str] = set()
    for file, source in _files():
        package = file.partition("/")[0]
        if package in LABELLED_PACKAGES:
            for text in _pieces(source, seen):
                examples.setdefault(text, (LABELLED_PACKAGES.index(package), file))
    return _balanced(examples, LABELLED_PACKAGES, _MOST_OF_A_PACKAGE)


def _balanced(
    examples: Mapping[str, tuple[int, str]], classes: Sequence[str], most_of_a_class: Mapping[str, int]
) -> DatasetDict:
    """Draw up to so many texts of every class in each split, by their digests, and leave them in that order."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(classes)), "file": Value("string")})
    rows: dict[str, dict[str, list[Any]]] = {split: {column: [] for column in features} for split in most_of_a_class}
    taken: Counter[tuple[str, int]] = Counter()
    for text in sorted(examples, key=_digest):
        label, file = examples[text]
        split = _split_of(file)
        if taken[split, label] < most_of_a_class[split]:
            taken[split, label] += 1
            for column, value in zip(features, (text, label, file), strict=True):
                rows[split][column].append(value)
    return DatasetDict({split: Dataset.from_dict(columns, features) for split, columns in rows.items()})


def _pieces(source: str, seen: set[str]) -> Iterator[str]:
    """Yield the words in pieces of equal number, without names of packages and lines `seen`, to which it adds its own.

    Imports, boilerplate and what was copied from file to file would otherwise be in several splits.
    """
    words: list[str] = []
    for line in _logical_lines(source):
        text = " ".join(token.string for token in line)
        if text not in seen:
            seen.add(text)
            words += _NAME_OF_A_PACKAGE.sub(MASK, text).split()
    for start in range(0, len(words) - _WORDS_OF_A_PIECE + 1, _WORDS_OF_A_PIECE):
        yield " ".join(words[start : start + _WORDS_OF_A_PIECE])


def _masked_lines(source: str) -> Iterator[tuple[str, int]]:
    """Yield lines of nested brackets with every word but the brackets hidden in turn, and the depth where it stood."""
    for line in _logical_lines(source):
        words = [token.string for token in line]
        depths = _depths(line)
        if len(" ".join(words)) > _LONGEST_LINE or max(depths) < 2:
            continue
        for position, depth in enumerate(depths):
            if line[position].type != tokenize.OP or words[position] not in _OPENING | _CLOSING:
                hidden = " ".join([*words[:position], MASK, *words[position + 1 :]])
                yield " ".join(hidden.split()), depth


def _logical_lines(source: str) -> Iterator[list[tokenize.TokenInfo]]:
    """Yield the words of every line, which goes on as long as a bracket is open, without comments."""
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _ENDS:
            if line:
                yield line
            line = []
        elif token.type not in _NO_WORDS:
            line.append(token)


def _depths(line: list[tokenize.TokenInfo]) -> list[int]:
    """Count for every word the brackets open around it; a bracket itself stands outside."""
    depths, depth = [], 0
    for token in line:
        bracket = token.string if token.type == tokenize.OP else ""
        depth -= bracket in _CLOSING
        depths.append(depth)
        depth += bracket in _OPENING
    return depths
