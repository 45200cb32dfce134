"""The range report's page: whole, about what there is and nothing else, and safe whatever files call their weights."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from report_checkpoints import save_checkpoints
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_r2.cli import app
from hf_r2.report import page, weight_statistics
from hf_r2.report.page import write_report
from hf_r2.report.range_plots import COLORS
from hf_r2.report.statistics import tensor_statistics

run = CliRunner().invoke
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '</code><img src=x onerror=alert(1)>$\\frac{</style><script>alert("1")</script>../../_&amp;'


class Parsed(HTMLParser):
    """A page's elements; refuses tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def report(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    result = run(app, ["report", *sources, "--output", str(folder / "report.html"), "--png", str(folder / "png")])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def parsed(report):
    return Parsed((report / "report.html").read_text(encoding="utf-8"))


def svg_of(attributes):
    kind, _, data = attributes["src"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data, validate=True))


def test_it_has_every_section_and_a_picture_of_every_weight(parsed, sources):
    assert parsed.sections == ["summary", "distributions", "profiles", "sqnr", "training", "weights"]
    names = re.findall(r"\S+\.weight", " ".join(parsed.words))
    for picture in parsed.all("img"):
        assert picture["alt"]
        assert svg_of(picture).tag.endswith("svg")
    assert len(parsed.all("details")) == len(set(names)) >= 4
    assert len(parsed.all("img")) == 4 + len(parsed.all("details"))


def test_it_needs_nothing_but_itself(parsed, report):
    assert not parsed.all("script") + parsed.all("link") + parsed.all("iframe")
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "href", "action")]
        assert attributes.get("src", "data:").startswith("data:")
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy.split("; ")[0] == "default-src 'none'"
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 400_000
    for picture in parsed.all("img"):
        for element in svg_of(picture).iter():
            links = [value for name, value in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith("#") for link in links)


def test_its_tables_can_be_read_aloud(parsed):
    assert len(parsed.all("table")) == 3
    assert {heading["scope"] for heading in parsed.all("th")} == {"col", "colgroup", "row"}
    assert parsed.all("html")[0]["lang"] == "en"


def test_its_figures_are_those_of_the_weights(parsed, sources):
    from transformers import ResNetForImageClassification

    for source in sources[:2]:
        for weight in weight_statistics(ResNetForImageClassification.from_pretrained(source)):
            crest, kurtosis = f"{weight.crest_factor:.2f}", f"{weight.kurtosis:.2f}"
            assert re.search(rf"\b{crest}\s+{kurtosis}\b", parsed.text)
            decibels = r"\s+".join(re.escape(f"{weight.sqnr[bits]:.1f}") for bits in (2, 3, 4, 8))
            assert re.search(decibels, parsed.text)
    assert "palette 2-bit" in parsed.text


def test_the_same_pictures_are_written_as_png(parsed, report):
    files = sorted((report / "png").iterdir())
    assert {"distributions.png", "profiles.png", "sqnr.png", "training.png"} < {file.name for file in files}
    assert len(files) == len(parsed.all("img"))
    for file in files:
        with Image.open(file) as image:
            assert image.width == 1040
            assert len(image.convert("RGB").getcolors(1 << 20)) > 3


def test_pictures_follow_the_scheme_of_the_reader_and_name_every_checkpoint(parsed):
    for picture in parsed.all("img"):
        svg = ElementTree.tostring(svg_of(picture), encoding="unicode")
        assert "prefers-color-scheme:dark" in svg
        assert "currentColor" in svg
        assert any(color in svg for color in COLORS)
    words = "".join(svg_of(parsed.all("img")[1]).itertext())
    assert all(label in words for label in ("baseline", "float", "compressed"))


def test_what_a_checkpoint_does_not_hold_has_no_section(tmp_path):
    save_file({"a": torch.randn(4, 6), "b": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    write_report([str(tmp_path)], tmp_path / "report.html")
    parsed = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert parsed.sections == ["summary", "distributions", "profiles", "sqnr", "weights"]
    assert "compress" not in parsed.text


def test_weights_that_one_checkpoint_alone_has_say_so(tmp_path):
    for folder, name in (("one", "only.one"), ("two", "only.two")):
        (tmp_path / folder).mkdir()
        save_file({"both": torch.randn(4, 6), name: torch.randn(2, 9)}, tmp_path / folder / "model.safetensors")
    write_report([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "report.html")
    text = Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert text.count("not there") == 2
    assert re.search(r"only\.one crest factor\s+[\d.]+\s+not in two", text)
    assert re.search(r"only\.two crest factor\s+not in one\s+[\d.]+", text)
    assert not re.search(r"both crest factor\s+not in", text)


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    folder = tmp_path / "_$x_$<b>&"
    folder.mkdir()
    weight = torch.randn(4, 6)
    save_file({HOSTILE: weight, "_$a": torch.randn(2, 2)}, folder / "model.safetensors")
    write_report([str(folder)], tmp_path / "report.html", tmp_path / "png")
    parsed = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE in "".join(parsed.words)
    assert not parsed.all("script") + parsed.all("b")
    assert all(image["src"].startswith("data:") and "onerror" not in image for image in parsed.all("img"))
    assert "_$x_$<b>&" in "".join(svg_of(parsed.all("img")[0]).itertext())
    assert f"{tensor_statistics('', weight).crest_factor:.2f}" in parsed.text
    assert {file.parent for file in tmp_path.rglob("*.png")} == {tmp_path / "png"}


def test_nothing_is_written_when_a_picture_cannot_be_drawn(sources, tmp_path, monkeypatch):
    def fail(checkpoints):
        raise ValueError("no picture")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(page.range_plots, "training_curves", fail)
    with pytest.raises(ValueError, match="no picture"):
        write_report(sources[1:2], tmp_path / "report.html", tmp_path / "png")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{model}"], "name one to 3 different checkpoints"),
        (["{here}/missing"], "error: "),
        (["{model}", "--output", "{here}"], "the page is a file"),
        (["{model}", "--png", "{model}/config.json", "--output", "{here}/report.html"], "the pictures go to a folder"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_written(sources, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(app, ["report", *(argument.format(model=sources[0], here=tmp_path) for argument in arguments)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
