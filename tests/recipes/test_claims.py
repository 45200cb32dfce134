"""What documents claim: no figure is typed by hand, and those of the study link to the cells that they are of."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FIGURE = re.compile(r"\d+(?:\.\d+)?\s?(?:%|×|± ?\d|points?\b|nats\b)")
RENDERED = re.compile(r"<!-- (?P<name>[^:>]+): rendered by .*?-->.*?<!-- end of (?P=name) -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`|^    .*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
DOCUMENTS = [ROOT / "README.md", ROOT / "recipes" / "study" / "README.md"]


def words_of(text):
    """What is written by hand: what neither is rendered nor code."""
    return CODE.sub("", RENDERED.sub("", text))


def block(document, name):
    return next(found[0] for found in RENDERED.finditer(document.read_text(encoding="utf-8")) if found["name"] == name)


def test_a_typed_figure_is_found():
    text = "<!-- a: rendered by x -->\n9 %\n<!-- end of a -->\nR2 keeps 97.3 % of it, `8 %`.\n"
    assert FIGURE.findall(words_of(text)) == ["97.3 %"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_no_figure_is_typed_by_hand(document):
    assert FIGURE.findall(words_of(document.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(("document", "name"), [(DOCUMENTS[0], "headline"), (DOCUMENTS[1], "conclusions")])
def test_figures_of_the_study_link_to_their_cells(document, name):
    text = block(document, name)
    links = LINK.findall(text)
    assert FIGURE.findall(LINK.sub("", text)) == []
    for shown, target in links:
        if FIGURE.search(shown):
            assert list((document.parent / target).glob("*.json")), target
    assert sum(bool(FIGURE.search(shown)) for shown, _ in links) > 5
