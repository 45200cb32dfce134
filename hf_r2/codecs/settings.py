"""What a codec needs to know about one weight."""

from dataclasses import asdict, dataclass

from hf_r2.grain import Grain, parse_grain

METHODS = ("uniform", "palette", "least_squares")
GRIDS = ("restricted", "full", "midrise")
RANGES = ("min_max", "mse", "percentile")
BASES = ("optimal", "greedy", "ternary")
_OPTIONS = {
    "symmetric": "uniform",
    "grid": "uniform",
    "range": "uniform",
    "cluster_dim": "palette",
    "basis": "least_squares",
    "percentile": "uniform",
}


@dataclass(frozen=True)
class CodecSettings:
    """Settings of one weight's codec, checked and complete.

    Args:
        method: `"uniform"`, `"palette"` or `"least_squares"`.
        bits: bits of a code: 2–8 for uniform, 1–8 for its midrise grid, for palette and least_squares.
        grain: which elements share a scale, a look-up table or a binary basis.
        symmetric: uniform only: levels on both sides of zero (the default), or an affine grid with a zero point.
        grid: symmetric uniform only: `"restricted"` (the default; 2 bits are {−1, 0, 1}·max|W|), `"full"` (one more
            level on the negative side) or `"midrise"` (2^bits levels, none of them zero).
        range: uniform only: `"min_max"` (the default), `"mse"`, the range of least squared error, or `"percentile"`,
            which leaves the outermost elements of a group outside.
        cluster_dim: palette only: elements that share a code, 1 (the default) to 64. The entries of a look-up table
            are vectors of so many values, and b bits of code make b / cluster_dim bits per weight.
        basis: least_squares only: `"optimal"` (the default; exact for 1 and 2 bits, refined from greedy beyond),
            `"greedy"`, or `"ternary"` (2 bits; levels −2v, 0 and 2v).
        percentile: range `"percentile"` only: the percentage p of a group's magnitudes that the grid covers, 50–100
            (99.9 by default). An affine grid reaches from the (100 − p)-th to the p-th percentile of the values.

    Raises:
        ValueError: for a value outside these, and for an option that the method does not have.
    """

    method: str = "uniform"
    bits: int = 4
    grain: Grain = "channel"
    symmetric: bool | None = None
    grid: str | None = None
    range: str | None = None
    cluster_dim: int | None = None
    basis: str | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: use one of {', '.join(METHODS)}")
        object.__setattr__(self, "grain", parse_grain(self.grain))
        fewest = 2 if self.method == "uniform" and self.grid != "midrise" else 1
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not fewest <= self.bits <= 8:
            hint = "; method='palette' goes down to 1 bit, and so does grid='midrise'" if fewest == 2 else ""
            raise ValueError(f"bits={self.bits!r} is not a whole number from {fewest} to 8 for {self.method}{hint}")
        for option, method in _OPTIONS.items():
            if method != self.method and getattr(self, option) is not None:
                raise ValueError(f"{option!r} is an option of method {method!r}; remove it for {self.method!r}")
        if self.method == "uniform":
            self._complete_uniform()
        elif self.method == "palette":
            self._complete_palette()
        else:
            self._complete_least_squares()

    def _complete_uniform(self) -> None:
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", True)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r} is not true or false")
        if self.grid is None and self.symmetric:
            object.__setattr__(self, "grid", "restricted")
        if self.grid is not None and not self.symmetric:
            raise ValueError(f"grid={self.grid!r} needs symmetric=True; an affine grid always uses all levels")
        if self.symmetric and self.grid not in GRIDS:
            raise ValueError(f"unknown grid {self.grid!r}: use one of {', '.join(GRIDS)}")
        if self.range is None:
            object.__setattr__(self, "range", "min_max")
        if self.range not in RANGES:
            raise ValueError(f"unknown range {self.range!r}: use one of {', '.join(RANGES)}")
        if self.range != "percentile":
            if self.percentile is not None:
                raise ValueError(f"percentile={self.percentile!r} needs range='percentile', not {self.range!r}")
            return
        if self.percentile is None:
            object.__setattr__(self, "percentile", 99.9)
        number = isinstance(self.percentile, int | float) and not isinstance(self.percentile, bool)
        if not number or not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile!r} is not a number from 50 to 100")

    def _complete_palette(self) -> None:
        if self.cluster_dim is None:
            object.__setattr__(self, "cluster_dim", 1)
        whole = isinstance(self.cluster_dim, int) and not isinstance(self.cluster_dim, bool)
        if not whole or not 1 <= self.cluster_dim <= 64:
            raise ValueError(f"cluster_dim={self.cluster_dim!r} is not a whole number from 1 to 64")

    def _complete_least_squares(self) -> None:
        if self.basis is None:
            object.__setattr__(self, "basis", "optimal")
        if self.basis not in BASES:
            raise ValueError(f"unknown basis {self.basis!r}: use one of {', '.join(BASES)}")
        if self.basis == "ternary" and self.bits != 2:
            raise ValueError(f"basis='ternary' has three levels, in codes of 2 bits: set bits=2, not {self.bits}")

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """Return the settings that the method has, as JSON holds them; a `cluster_dim` of 1 goes without saying."""
        content = {key: value for key, value in asdict(self).items() if value is not None}
        if self.cluster_dim == 1:
            del content["cluster_dim"]
        return content

    def settings_for(self, name: str | None) -> "CodecSettings":
        """Return these settings: the same for every weight. A quantization config answers by name."""
        return self
