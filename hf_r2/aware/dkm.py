"""DKM: train through differentiable k-means, so that weights settle on the palettes they will be stored as."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_r2.aware.rounded import Rounded
from hf_r2.aware.soft_kmeans import SoftKMeans, soft_kmeans
from hf_r2.codecs import CodecSettings, Encoded, encode, palette
from hf_r2.codecs.bitpack import pack
from hf_r2.grain import blocks, group_counts, join

MERGED = 1e-3
"""Two centroids have met when they are closer than this share of the largest distance between any."""

LEAST_MASS = 0.5
"""A cluster with less, in elements or vectors, is empty."""


@dataclass(frozen=True)
class DKMOptions:
    """Options of DKM: `R2QuantizationConfig.aware_options`.

    Args:
        temperature: of the softmax over squared distances. Relative to the variance of each group of the weight, unless
            `absolute`: squared distances grow with the variance, so a fixed temperature would be nearly hard for a
            weight of size 1 and merge all centroids of one of size 0.01. None takes
            `min(0.06 · k^(−2/3d), 2.4 · k^(−2/d))` for k centroids of d dimensions: hard enough that the soft weight is
            near the stored one, soft enough for tables (see `hf_r2.aware.soft_kmeans`) unless a weight has outliers.
            The second term keeps many centroids apart, whose squared distances shrink at its rate. Small weights with
            long tails, which strong weight decay leaves, train better at a softer one, such as 0.06 for 4 centroids.
        absolute: take the temperature as it is, in squared units of the weight (coremltools' default is 1e-4).
        iterations: of soft k-means in one training step, at most; all are differentiated through.
        tolerance: stop earlier once no centroid moves by more than this share of its group's spread.
        implicit: differentiate through the converged map instead of through the iterations; up to 4 scalar centroids.
        memory: bytes that the temporaries of the exact path may take.

    Raises:
        ValueError: for a value out of its range.
    """

    temperature: float | None = None
    absolute: bool = False
    iterations: int = 3
    tolerance: float = 1e-4
    implicit: bool = False
    memory: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} is not above 0")
        if self.absolute and self.temperature is None:
            raise ValueError("absolute=true needs a temperature, in squared units of the weight")
        for name, least in {"iterations": 1, "tolerance": 0, "memory": 1}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} is not {least} or more")

    def temperature_for(self, bits: int, cluster_dim: int) -> float:
        """Return the temperature for 2^bits centroids of `cluster_dim` dimensions."""
        return self.temperature if self.temperature is not None else default_temperature(bits, cluster_dim)

    def cluster(self, block: Tensor, centroids: Tensor, temperature: float, compiled: bool) -> SoftKMeans:
        """Call [`soft_kmeans`] with these options."""
        return soft_kmeans(
            block,
            centroids,
            temperature,
            absolute=self.absolute,
            iterations=self.iterations,
            tolerance=self.tolerance,
            implicit=self.implicit,
            memory=self.memory,
            compiled=compiled,
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the names of the options."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return {key: value for key, value in asdict(self).items() if value != getattr(type(self), key)}


def default_temperature(bits: int, cluster_dim: int) -> float:
    """Return the relative temperature of [`DKMOptions`] for 2^bits centroids."""
    k = 2 ** (bits / cluster_dim)
    return min(0.06 * k ** (-2 / 3), 2.4 * k**-2)


class DKM(Rounded):
    """Parametrization of a weight by its soft palette (Cho et al., arXiv 2108.12659).

    In training, the weight is `A C`: every element (or vector of `cluster_dim` elements) is the mean of the centroids C
    of its group under softmax attention A, and C comes from a few soft k-means iterations that start from the centroids
    of the last step. In evaluation, it is the nearest centroid: the very weight that is stored, see [`encoded`].

    Until [`start`] is called, the weight passes through as it is.

    Args:
        weight: as the layer holds it; its shape and device count.
        settings: of the palette codec.
        options: see [`DKMOptions`].
        transpose: whether the layer keeps its output channels last (transformers' Conv1D).
        name: of the weight, for messages.
    """

    trained = ("centroids", "masses")

    def __init__(
        self, weight: Tensor, settings: CodecSettings, options: DKMOptions, transpose: bool, name: str
    ) -> None:
        super().__init__(settings, transpose, name)
        self.require_whole(weight, "DKM needs")
        self.options = options
        # What a step ends with becomes the next one's start once a gradient has passed: when the forward pass is
        # repeated before that (gradient checkpointing), it has to find the same start
        self.advance = True
        self.compiled = False
        shape = (weight.T if transpose else weight).shape
        size, _ = palette.codebook_like(shape, settings)["lut"]
        for buffer, shape in {"centroids": size, "first": size, "masses": size[:2]}.items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=weight.device)
            self.register_buffer(buffer, zeros, persistent=False)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Begin with the optimal palette of the weight; without effect once begun.

        Raises:
            ValueError: for a weight with NaN or infinite values.
        """
        if not self.active:
            tables = encode(self.output_first(weight), self.settings, self.name).codebook["lut"]
            self.load(tables)

    def load(self, centroids: Tensor, masses: Tensor | None = None) -> None:
        """Begin with these centroids, `(groups, 2^bits)` or `(groups, 2^bits, cluster_dim)`.

        Args:
            centroids: of the step before.
            masses: theirs, `(groups, 2^bits)`; without, no cluster is known to be empty.
        """
        self.centroids.copy_(centroids)
        self.masses.copy_(torch.full_like(self.masses, LEAST_MASS) if masses is None else masses)
        self.active = self.advance = True

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Fuse passes over the elements of large weights on a CPU with `torch.compile`; nothing else needs it."""
        self.compiled = True

    # Its steps depend on values that a compiler could only trace for one weight at a time
    @torch.compiler.disable
    def forward(self, weight: Tensor) -> Tensor:
        """Return the soft weight in training, the compressed one in evaluation; both of the layout of the weight."""
        if not self.active or not self.training:
            return super().forward(weight)
        values = self.output_first(weight)
        if self.advance:
            self.first.copy_(reseeded(self.centroids, self.masses))
            self.advance = False
        parts, ends, masses = [], [], []
        counts = group_counts(values.shape, self.settings.grain)
        for block, table in zip(blocks(values, self.settings.grain), self.first.clone().split(counts), strict=True):
            soft = self.options.cluster(block, table, self.temperature, self.compiled)
            parts.append(soft.weights)
            ends.append(soft.centroids)
            masses.append(soft.masses)
        self.centroids.copy_(torch.cat(ends))
        self.masses.copy_(torch.cat(masses))
        soft_weight = join(parts, values.shape, self.settings.grain).to(weight.dtype)
        if soft_weight.requires_grad:
            soft_weight.register_hook(self._note_gradient)
        return self.output_first(soft_weight)

    @torch.no_grad()
    def encoded(self, weight: Tensor) -> Encoded:
        """Compress the weight as it is now: every element (or vector) to its nearest centroid."""
        values = self.output_first(weight.detach())
        # The codec wants ascending values; entries of vectors are in no order
        tables = self.centroids.sort(dim=1).values if self.centroids.dim() == 2 else self.centroids.clone()
        codes = palette.assign(values, tables, self.settings)
        return Encoded(pack(codes, self.settings.bits), {"lut": tables}, values.shape, weight.dtype, self.settings)

    @property
    def temperature(self) -> float:
        """The temperature in force, see [`DKMOptions`]."""
        return self.options.temperature_for(self.settings.bits, self.settings.cluster_dim)

    @torch.no_grad()
    def warnings(self, weight: Tensor) -> list[str]:
        """Say what a temperature that is too high does to the weight; the host waits for the weight's device."""
        found = []
        variance = weight.float().var(correction=0).item()
        absolute = self.temperature if self.options.absolute else self.temperature * variance
        if absolute > variance > 0:
            found.append(
                f"{self.name}: the temperature {absolute:.3g} is above the weight's variance {variance:.3g}, so all "
                "centroids move to its mean; lower aware_options.temperature"
            )
        if self.active and bool(redundant(self.centroids, self.masses).any()):
            found.append(
                f"{self.name}: centroids have merged or lost all their elements; lower aware_options.temperature, or "
                "give the weight fewer bits"
            )
        return found

    def _note_gradient(self, gradient: Tensor) -> None:
        self.advance = True


def redundant(centroids: Tensor, masses: Tensor) -> Tensor:
    """Tell which clusters do nothing: those without mass, and those that have met one before them.

    Args:
        centroids: `(groups, k)` or `(groups, k, d)`.
        masses: sums of attention, `(groups, k)`.

    Returns:
        bool, `(groups, k)`.
    """
    earlier = torch.ones(masses.shape[1], masses.shape[1], dtype=torch.bool, device=masses.device).tril(-1)
    return (_together(_distances(centroids)) & earlier).any(dim=2) | (masses < LEAST_MASS)


def reseeded(centroids: Tensor, masses: Tensor) -> Tensor:
    """Move one redundant centroid of each group halfway between the heaviest cluster and its nearest neighbour.

    Centroids that have met get the same attention and would stay together for ever; one without mass would stay where
    it is. Where all centroids are one, as in a constant group, there is no neighbour, and they stay.

    Args:
        centroids: `(groups, k)` or `(groups, k, d)`.
        masses: sums of attention, `(groups, k)`.

    Returns:
        New centroids, of the same shape.
    """
    idle = redundant(centroids, masses)
    if idle.is_cpu and not idle.any():
        return centroids
    points = centroids.reshape(*masses.shape, -1)
    group = torch.arange(len(masses), device=masses.device)
    heaviest = masses.argmax(dim=1)
    distances = _distances(centroids)
    apart = distances[group, heaviest].masked_fill(_together(distances)[group, heaviest], torch.inf)
    middle = (points[group, heaviest] + points[group, apart.argmin(dim=1)]) / 2
    place = idle.float().argmax(dim=1)
    wanted = (idle.any(dim=1) & apart.isfinite().any(dim=1))[:, None]
    result = points.clone()
    result[group, place] = torch.where(wanted, middle, points[group, place])
    return result.view(centroids.shape)


def _distances(centroids: Tensor) -> Tensor:
    points = centroids.reshape(*centroids.shape[:2], -1)
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def _together(distances: Tensor) -> Tensor:
    return distances <= MERGED * distances.amax(dim=(1, 2), keepdim=True)
