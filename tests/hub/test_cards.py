"""What the Hub says of the cards in model_cards/: its client's check, answered by the loopback Hub's rules."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

CARDS = sorted((Path(__file__).parent.parent.parent / "model_cards").glob("*/*/README.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_the_hub_accepts_a_published_card(hub, path):
    ModelCard.load(path).validate()
    assert hub.calls("POST /api/validate-yaml")


def test_the_hub_refuses_a_card_with_a_license_that_there_is_not(hub):
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: none of these\n---\n").validate()
