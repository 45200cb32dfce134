"""What every weight may become, what that takes, and what a target allows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_r2.codecs import METHODS, CodecSettings
from hf_r2.grain import Grain
from hf_r2.planning.allocation import Allocation, allocate
from hf_r2.planning.source import FloatCheckpoint

ANY = "any"

Settings = dict[str, CodecSettings]
"""How every weight is compressed, by name."""


def candidates(method: str, grain: Grain) -> list[CodecSettings]:
    """List the settings that a weight may get: all bits of one codec, or with `"any"` of every codec.

    Raises:
        ValueError: for an unknown method or grain.
    """
    if method != ANY and method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join((*METHODS, ANY))}")
    return [
        CodecSettings(codec, bits, grain)
        for codec in (METHODS if method == ANY else (method,))
        for bits in range(2 if codec == "uniform" else 1, 9)
    ]


class Choices:
    """The choices of every weight.

    Attributes:
        checkpoint: whose weights they are.
        names: of the weights, in the order of the other lists.
        options: the settings of every choice, by weight.
        nbytes: bytes of every choice with its codebook, by weight.

    Args:
        checkpoint: whose weights they are.
        method: see [`candidates`].
        grain: see there.
    """

    def __init__(self, checkpoint: FloatCheckpoint, method: str, grain: Grain) -> None:
        self.checkpoint = checkpoint
        self.names = list(checkpoint.weights)
        self._every = candidates(method, grain)
        self.options = [_smaller_than_float(checkpoint, name, self._every) for name in self.names]
        self.nbytes = [
            [checkpoint.weights[name].nbytes(settings) for settings in own]
            for name, own in zip(self.names, self.options, strict=True)
        ]

    def settings(self, choices: Sequence[int]) -> Settings:
        """Return the settings that choices stand for."""
        return {name: own[choice] for name, own, choice in zip(self.names, self.options, choices, strict=True)}

    def index(self, settings: Mapping[str, CodecSettings]) -> list[int]:
        """Return the choices that settings are: the inverse of [`settings`]."""
        return [own.index(settings[name]) for name, own in zip(self.names, self.options, strict=True)]

    def extreme(self, largest: bool) -> list[int]:
        """Return the largest choice of every weight, or the smallest."""
        pick = max if largest else min
        return [pick(range(len(sizes)), key=sizes.__getitem__) for sizes in self.nbytes]

    def uniform(self) -> list[Settings]:
        """List the ways to give all weights the same method and bits; where that does not pay, the next fewer."""
        found = []
        for settings in self._every:
            fewer = [
                [option for option in own if option.method == settings.method and option.bits <= settings.bits]
                for own in self.options
            ]
            if all(fewer) and any(own[-1] == settings for own in fewer):
                found.append({name: own[-1] for name, own in zip(self.names, fewer, strict=True)})
        return found


class Target:
    """How large a plan may be.

    Args:
        choices: what there is to choose from.
        file_bytes: bytes of the weight files, headers and what is not compressed included; or
        bits: bits per compressed weight, codebooks included.

    Raises:
        ValueError: if the choices cannot meet it, or cannot come up to it.
    """

    def __init__(self, choices: Choices, file_bytes: int | None = None, bits: float | None = None) -> None:
        self._choices = choices
        self._of_files = bits is None
        numel = choices.checkpoint.numel
        self.nbytes = file_bytes if bits is None else bits * numel / 8
        ends = [self.size(choices.extreme(largest)) for largest in (False, True)]
        if ends[0] <= self.nbytes <= ends[1]:
            return
        if self._of_files:
            wanted, possible = f"{file_bytes:,} bytes", f"{ends[0]:,} to {ends[1]:,} bytes"
        else:
            wanted = f"{bits} bits per weight"
            possible = f"{8 * ends[0] / numel:.4g} to {8 * ends[1] / numel:.4g} bits"
        raise ValueError(f"{wanted} cannot be planned: with these weights, method and grain it is {possible}")

    def size(self, choices: Sequence[int]) -> int:
        """Bytes that count: of the files, or of the compressed weights alone."""
        if self._of_files:
            return self._choices.checkpoint.file_bytes(self._choices.settings(choices))
        return sum(sizes[choice] for sizes, choice in zip(self._choices.nbytes, choices, strict=True))

    def allocate(self, losses: Sequence[Mapping[int, float]]) -> Allocation:
        """Find the choices of least total loss within the target.

        The length of a file's header depends on what is chosen. It is taken to be that of the smallest choices, and
        what a solution then has too much is taken off the budget, until it fits.

        Args:
            losses: of the choices that are allowed, by weight.
        """
        allowed = [list(own) for own in losses]
        nbytes = [[sizes[choice] for choice in own] for sizes, own in zip(self._choices.nbytes, allowed, strict=True)]
        least = sum(map(min, nbytes))
        smallest = [own[sizes.index(min(sizes))] for sizes, own in zip(nbytes, allowed, strict=True)]
        budget = max(least, least + int(self.nbytes - self.size(smallest)))
        while True:
            found = allocate(nbytes, [list(own.values()) for own in losses], budget)
            chosen = tuple(own[position] for own, position in zip(allowed, found.choices, strict=True))
            excess = self.size(chosen) - self.nbytes
            if excess <= 0 or found.nbytes == least:
                return replace(found, choices=chosen)
            budget = max(least, found.nbytes - math.ceil(excess))


def _smaller_than_float(
    checkpoint: FloatCheckpoint, name: str, settings: Sequence[CodecSettings]
) -> list[CodecSettings]:
    """Leave out what takes as many bytes as the float weight, of which large tables are capable; but the smallest."""
    weight = checkpoint.weights[name]
    sizes = [weight.nbytes(choice) for choice in settings]
    most = max(weight.shape.numel() * weight.dtype.itemsize - 1, min(sizes))
    return [choice for choice, size in zip(settings, sizes, strict=True) if size <= most]
