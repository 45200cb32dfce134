"""What the renderers of the studies share."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def insert(text: str, name: str, program: str, rendered: str) -> str:
    """Put what is rendered between the markers of a study."""
    begin, end = f"<!-- {name}: rendered by recipes/study/{program} -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{rendered}\n\n{end}{rest.partition(end)[2]}"
