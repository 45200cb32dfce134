"""The losses of choices: every weight is compressed by every choice, and only the figures are kept."""

from tqdm.auto import tqdm

from hf_r2.codecs import decode, encode
from hf_r2.planning.calibration import CalibratedModel
from hf_r2.planning.choices import Choices
from hf_r2.planning.sensitivity import fisher_loss, relative_noise
from hf_r2.quantization.workers import start_workers


def measured_losses(choices: Choices, sensitivity: str, model: CalibratedModel | None) -> list[list[float]]:
    """Measure the loss of every choice of every weight, one weight at a time.

    Args:
        choices: what there is to choose from.
        sensitivity: one of `SENSITIVITIES`.
        model: for those that need data.

    Returns:
        Losses by weight and choice.
    """
    with tqdm(total=sum(map(len, choices.options)), desc=f"Sensitivities ({sensitivity})", unit="choice") as bar:
        if sensitivity == "kl":
            return _divergences(choices, model, bar)
        fisher = model.fisher() if sensitivity == "fisher" else None

        def measure(index: int) -> list[float]:
            name, losses = choices.names[index], []
            weight = choices.checkpoint.weights[name].read()
            for settings in choices.options[index]:
                decoded = decode(encode(weight, settings, name))
                if fisher is None:
                    losses.append(relative_noise(weight, decoded))
                else:
                    losses.append(fisher_loss(fisher[name].to(weight.device), weight, decoded))
                bar.update()
            return losses

        with start_workers() as workers:
            return list(workers.in_order(measure, range(len(choices.names))))


def _divergences(choices: Choices, model: CalibratedModel, bar: tqdm) -> list[list[float]]:
    found = []
    for name, options in zip(choices.names, choices.options, strict=True):
        weight, losses = choices.checkpoint.weights[name].read(), []
        for settings in options:
            with model.changed(name, settings, weight):
                losses.append(model.measure().kl)
            bar.update()
        found.append(losses)
    return found
