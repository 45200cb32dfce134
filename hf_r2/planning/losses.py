"""The losses of choices: every weight is compressed by every choice, and only the figures are kept."""

from tqdm.auto import tqdm

from hf_r2.codecs import decode, encode
from hf_r2.planning.calibration import CalibratedModel
from hf_r2.planning.choices import Choices
from hf_r2.planning.sensitivity import SENSITIVITIES, fisher_loss, relative_noise
from hf_r2.quantization.workers import start_workers

Losses = list[list[float]]
"""Losses by weight and choice."""


def measured_losses(choices: Choices, sensitivity: str, model: CalibratedModel | None) -> dict[str, Losses]:
    """Measure the loss of every choice of every weight, one weight at a time.

    Args:
        choices: what there is to choose from.
        sensitivity: one of `SENSITIVITIES`.
        model: for those that need data.

    Returns:
        The losses by that sensitivity, and by those that cost less and fall off on the way.
    """
    wanted = list(SENSITIVITIES)[: list(SENSITIVITIES).index(sensitivity) + 1]
    fisher = model.fisher() if "fisher" in wanted else {}

    def measure(index: int) -> dict[str, list[float]]:
        name, found = choices.names[index], {kind: [] for kind in wanted}
        weight = choices.checkpoint.weights[name].read()
        for settings in choices.options[index]:
            if "kl" in wanted:
                with model.changed(name, settings, weight) as decoded:
                    found["kl"].append(model.measure().kl)
            else:
                decoded = decode(encode(weight, settings, name))
            found["sqnr"].append(relative_noise(weight, decoded))
            if fisher:
                found["fisher"].append(fisher_loss(fisher[name].to(weight.device), weight, decoded))
            bar.update()
        return found

    total, every = sum(map(len, choices.options)), range(len(choices.names))
    with tqdm(total=total, desc=f"Sensitivities ({sensitivity})", unit="choice") as bar, start_workers() as workers:
        # The model is one, and takes one weight after another
        found = list(map(measure, every) if "kl" in wanted else workers.in_order(measure, every))
    return {kind: [own[kind] for own in found] for kind in wanted}
