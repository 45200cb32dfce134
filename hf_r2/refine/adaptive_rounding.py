"""AdaRound: learn for every weight whether to round it down or up (Nagel et al., arXiv 2004.10568).

With codes c = W / s + offset of a uniform grid, the soft weight is s (clip(⌊c⌋ + h(V)) − offset), where
h(V) = clip((ζ − γ) sigmoid(V) + γ, 0, 1), ζ = 1.1, γ = −0.1, and V starts where h(V) = c − ⌊c⌋. Layer by layer it
minimizes

    ‖f(W x + b) − f(W̃ x̂ + b)‖² + λ Σ (1 − |2 h(V) − 1|^β)

over inputs x̂ behind the layers that are rounded already, with x from the float model and f the batch norm and ReLU
that follow. β falls from 20 to 2, which drives every h to 0 or 1.

Here every output channel's error counts relative to that of nearest rounding, so that one λ serves weights of any
scale; and in the end a channel keeps nearest rounding where that is better on the same data.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_r2.codecs import CodecSettings, Encoded, encode
from hf_r2.codecs.bitpack import pack, unpack
from hf_r2.codecs.encoded import SettingsByName
from hf_r2.codecs.uniform import code_limits, dequantize, unrounded
from hf_r2.refine.capture import Batches, Trace, follow, run_to
from hf_r2.refine.matrices import group_count, input_rows, matrices, multiply, output_rows
from hf_r2.refine.sequence import round_in_sequence

_ZETA, _GAMMA = 1.1, -0.1
_ITERATIONS, _ROWS, _LEARNING_RATE = 1000, 256, 3e-2
_LAMBDA, _WARM_UP, _BETAS = 30.0, 0.2, (20.0, 2.0)
_CHECK = 50  # iterations between looks at whether all is decided
_CAPTURED = 1 << 27  # bytes of one layer's rows that are kept
_PIECE = 1 << 14  # rows that are evaluated at a time


@torch.no_grad()
def adaround(
    model: nn.Module, selection: Mapping[str, tuple[nn.Module, str]], config: SettingsByName, batches: Batches
) -> dict[str, Encoded]:
    """Round the weights of uniform codecs adaptively, layer by layer; others are compressed as always.

    Args:
        model: float model; its weights become the compressed ones.
        selection: what `select_weights` returns.
        config: settings by name; `range` and `grain` make the grid.
        batches: calibration data, without labels. Memory holds a copy of the model and of every layer in turn at most
            128 MiB of rows, drawn at random.

    Returns:
        The compressed weights by name; those of layers that do not run are left out.

    Raises:
        ValueError: if no weight is uniform, or there are no batches.
    """
    if not any(config.settings_for(name).method == "uniform" for name in selection):
        raise ValueError("'adaround' is for method='uniform'; use 'compensate', or remove it from refine")
    reference = copy.deepcopy(model).eval()
    twins = dict(zip(model.modules(), reference.modules(), strict=True))

    def rounding(name: str, layer: nn.Module, weight: Tensor, settings: CodecSettings, found: Trace) -> Encoded:
        nearest = encode(weight, settings, name)
        if settings.method != "uniform":
            return nearest
        calls = found.calls[name]
        rows = _CAPTURED // (len(batches) * calls * 4 * (weight[0].numel() * group_count(layer) + len(weight)))
        generator, parts = torch.Generator().manual_seed(0), []
        for batch in batches:
            pairs = zip(run_to(model, layer, calls, batch), run_to(reference, twins[layer], calls, batch), strict=True)
            for (inputs, _), (_, outputs) in pairs:
                parts.append(_sample(layer, inputs, outputs, max(1, rows), generator))
        problem = LayerProblem(layer, *map(torch.cat, zip(*parts, strict=True)), found.following[name])
        return round_adaptively(weight, nearest, problem, _ITERATIONS)

    return round_in_sequence(model, selection, config, batches, rounding, "Rounding adaptively")


@dataclass
class LayerProblem:
    """What the rounding of one layer is measured by.

    Args:
        layer: whose weight is rounded.
        rows: its inputs, float32 `(rows, groups, n)`, see [`input_rows`].
        targets: outputs of the float model at the same positions, bias included, float32 `(rows, out)`.
        following: batch norm and ReLU behind the layer, f.
    """

    layer: nn.Module
    rows: Tensor
    targets: Tensor
    following: list[nn.Module] = field(default_factory=list)

    def squared_errors(self, weight: Tensor, part: Tensor | slice) -> Tensor:
        """Return (f(W̃ x̂ + b) − f(W x + b))² for some of the rows: `(rows, out)`, differentiable in the weight."""
        outputs = multiply(self.rows[part], matrices(self.layer, weight))
        if self.layer.bias is not None:
            outputs = outputs + self.layer.bias.detach().float()
        return (follow(self.following, outputs) - follow(self.following, self.targets[part])).square()

    @torch.no_grad()
    def mean_squared_errors(self, weight: Tensor) -> Tensor:
        """Average the squared errors of every output channel over all rows: `(out,)`."""
        starts = range(0, len(self.rows), _PIECE)
        sums = [self.squared_errors(weight, slice(start, start + _PIECE)).sum(dim=0) for start in starts]
        return torch.stack(sums).sum(dim=0) / len(self.rows)


@torch.enable_grad()
def round_adaptively(weight: Tensor, nearest: Encoded, problem: LayerProblem, iterations: int) -> Encoded:
    """Learn the rounding of one weight on the grid of its nearest rounding.

    Args:
        weight: `(out, in / groups, …)`.
        nearest: the weight, encoded with a uniform codec; its scales and zero points stay.
        problem: what the rounding is measured by.
        iterations: steps of Adam at most; it stops once every weight is decided.

    Returns:
        The weight with learned codes. No output channel has a greater error on the rows than with nearest rounding.
    """
    settings, codebook = nearest.settings, nearest.codebook
    codes = unrounded(weight, codebook, settings)
    down = codes.floor()

    def decoded(up: Tensor) -> Tensor:
        return dequantize((down + up).clamp(*code_limits(settings)), codebook, settings)

    nearest_codes = unpack(nearest.codes, nearest.bits, nearest.code_count).view(weight.shape)
    least = problem.mean_squared_errors(dequantize(nearest_codes, codebook, settings))
    relative = torch.where(least > 0, 1 / least, torch.zeros_like(least))
    latent = start_latent(codes - down).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for step in range(iterations):
        batch = torch.randint(len(problem.rows), (_ROWS,), generator=generator).to(weight.device)
        up = rectified_sigmoid(latent)
        loss = (problem.squared_errors(decoded(up), batch).mean(dim=0) * relative).sum()
        progress = step / iterations
        if progress >= _WARM_UP:
            loss = loss + _LAMBDA * undecided(up, beta_at(progress)) / weight[0].numel()
            if step % _CHECK == 0 and bool(((up == 0) | (up == 1)).all()):
                break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hard = (latent.detach() >= 0).to(down.dtype)
    learned_codes = (down + hard).clamp(*code_limits(settings)).to(torch.uint8)
    better = problem.mean_squared_errors(dequantize(learned_codes, codebook, settings)) < least
    chosen = torch.where(better.view(-1, *[1] * (weight.dim() - 1)), learned_codes, nearest_codes)
    return replace(nearest, codes=pack(chosen, nearest.bits))


def rectified_sigmoid(latent: Tensor) -> Tensor:
    """Return h(V), the share of rounding up, in [0, 1]."""
    return (torch.sigmoid(latent) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def start_latent(fraction: Tensor) -> Tensor:
    """Return the V whose h(V) is a fraction in [0, 1): V = −ln((ζ − γ) / (fraction − γ) − 1)."""
    return -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)


def undecided(up: Tensor, beta: float) -> Tensor:
    """Return Σ (1 − |2 h − 1|^β), 0 where every h is 0 or 1."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()


def beta_at(progress: float) -> float:
    """Return β, by a half cosine from 20 at the end of the warm-up to 2 at the end."""
    first, last = _BETAS
    share = (progress - _WARM_UP) / (1 - _WARM_UP)
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _sample(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw rows of inputs and the float model's outputs at the same positions, both in float32."""
    targets = output_rows(layer, outputs)
    positions = torch.randperm(len(targets), generator=generator)[:count].to(targets.device)
    return input_rows(layer, inputs, positions).float(), targets[positions].float()
