from pathlib import Path

import pytest

from hf_r2.aware import AWARE_METHODS
from hf_r2.codecs import CODECS, METHODS
from hf_r2.losses import RANGE_LOSSES
from hf_r2.refine import REFINEMENTS
from hf_r2.report.card import AWARE_SENTENCES, LOSS_SENTENCES, METHOD_SENTENCES, REFINEMENT_SENTENCES
from hf_r2.training.arguments import R2TrainingArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "hf_r2/quantization/FORMAT.md").read_text(encoding="utf-8")


def read_tests(folder):
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / folder).rglob("test_*.py"))


@pytest.mark.parametrize("kind", RANGE_LOSSES)
def test_range_loss_is_tested_documented_and_has_card_text(kind):
    assert f'"{kind}"' in read_tests("losses")
    assert f"| `{kind}` |" in README
    assert kind in LOSS_SENTENCES
    assert kind in R2TrainingArguments.__dataclass_fields__["r2_loss"].metadata["help"]


@pytest.mark.parametrize("method", METHODS)
def test_codec_is_tested_documented_and_has_card_text(method):
    assert f'"{method}"' in read_tests("codecs")
    assert f'"{method}"' in read_tests("quantization")
    assert f"| `{method}` |" in README
    assert f"| {method}" in FORMAT
    assert method in METHOD_SENTENCES
    assert method in CODECS


@pytest.mark.parametrize("method", AWARE_METHODS)
def test_aware_method_is_tested_documented_and_has_card_text(method):
    for folder in ("aware", "quantization", "training"):
        assert method in read_tests(folder).lower()
    assert f"| `{method}` |" in README
    assert method in AWARE_SENTENCES
    assert method in R2TrainingArguments.__dataclass_fields__["r2_aware"].metadata["help"]


@pytest.mark.parametrize("step", REFINEMENTS)
def test_refinement_is_tested_documented_and_has_card_text(step):
    assert f'"{step}"' in read_tests("refine")
    assert f"| `{step}` |" in README
    assert f'`"{step}"`' in FORMAT
    assert step in REFINEMENT_SENTENCES
