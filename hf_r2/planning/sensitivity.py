"""How much it costs to compress one weight, in three ways; each is a figure that is added up over weights.

| sensitivity | loss of a weight W that becomes Ŵ | data |
|---|---|---|
| `sqnr` | Σ (W − Ŵ)² / Σ W² = 10^(−SQNR / 10) | none |
| `fisher` | ½ Σᵢ Fᵢ (Ŵᵢ − Wᵢ)², F the diagonal of the Fisher information | unlabelled |
| `kl` | KL(float model ‖ model with Ŵ alone), measured | unlabelled |

The Fisher form is the second-order expansion of the KL divergence around the float model, without what couples
elements: the gradient of the divergence is zero there, and its Hessian is the Fisher information.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.codecs.error import energies
from hf_r2.grain import pieces

SENSITIVITIES = {"sqnr": False, "fisher": True, "kl": True}
"""Names, those that cost least first, and whether they need data."""

FISHER_ROWS = 8
_SEED = 0


def relative_noise(weight: Tensor, decoded: Tensor) -> float:
    """Return Σ (W − Ŵ)² / Σ W², summed in float64; 0 for an exact copy, also of zeros."""
    signal, noise = energies(weight, decoded)
    return noise / signal if noise > 0 else 0.0


def fisher_loss(fisher: Tensor, weight: Tensor, decoded: Tensor) -> float:
    """Return ½ Σ F (Ŵ − W)², summed in float64; in nats per example if F is per example.

    Args:
        fisher: diagonal of the Fisher information, of the weight's shape.
        weight: float weight.
        decoded: the same compressed.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _, parts in pieces(*(tensor.detach().reshape(1, -1) for tensor in (fisher, weight, decoded))):
        importance, original, rounded = (part.double() for part in parts)
        total += (importance * (original - rounded).square_()).sum()
    return total.item() / 2


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference ‖ logits) of every row in nats, float64 `(…)` and never below 0.

    Args:
        logits: `(…, classes)`.
        reference: logarithms of probabilities, `(…, classes)`.
    """
    ours = logits.double().log_softmax(dim=-1)
    rows = nn.functional.kl_div(ours, reference.double(), reduction="none", log_target=True).sum(dim=-1)
    return rows.clamp_min(0)  # rounding may leave −1e-17


def diagonal_fisher(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information, E (∂ log p(y | x) / ∂W)², per row of logits, in float32.

    Labels y are drawn from the model's own predictions, with a fixed seed, so that true ones play no part. For drawn
    labels the gradient of a row has mean zero and rows are independent; the square of the gradient of their sum
    therefore has the mean of the sum of squares, and a few rows can go through one backward pass. It takes a model
    whose rows do not see each other, as in evaluation mode.

    Args:
        model: in evaluation mode; its output has logits `(rows, …, classes)`.
        weights: parameters by name.
        batches: keyword arguments of the model, without labels, on its device.
    """
    generator = torch.Generator().manual_seed(_SEED)
    wanted = list(weights.values())
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    rows = 0
    for weight in wanted:
        weight.requires_grad_(True)
    for batch in batches:
        length = len(next(iter(batch.values())))
        for start in range(0, length, FISHER_ROWS):
            part = {key: value[start : start + FISHER_ROWS] for key, value in batch.items()}
            logits = model(**part).logits.float().log_softmax(dim=-1).flatten(0, -2)
            drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(logits.device)
            gradients = torch.autograd.grad(logits.gather(1, drawn).sum(), wanted, allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            rows += len(logits)
    return {name: total / rows for name, total in sums.items()}
