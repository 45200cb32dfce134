"""What the benchmarks share: clocks, peak memory, the facts of a run, and the tables in README.md."""

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import hf_r2
from hf_r2.files import atomic_write

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


IN_A_ROW = 10


def milliseconds(run: Callable[[], object], cuda: bool) -> float:
    """Time a call; on one CPU thread by the process's own clock, which others disturb less.

    On a device, time one of some in a row: training does not wait between its steps, and a call takes it what the host
    or the device takes for it, whichever is longer.
    """
    if cuda:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            run()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / IN_A_ROW
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1000 * (clock() - start)


def extra_bytes(run: Callable[[], object], cuda: bool) -> int:
    """Most that torch held at a time beyond what it held before; NumPy's small copies of cells do not count."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))


def facts(threads: int, cuda: bool = False) -> dict[str, Any]:
    """Say what a run ran on: device, threads, versions, commit and date."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True).strip()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu[1] if cpu else platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "hf_r2": hf_r2.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def save(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def between(text: str, begin: str, end: str, content: str) -> str:
    """Put content between two markers of a text."""
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def update_readme(render: Callable[[str], str], check: bool, program: str) -> None:
    """Render README.md, or exit 1 if that would change it."""
    current = README.read_text(encoding="utf-8")
    rendered = render(current)
    if check and rendered != current:
        raise SystemExit(f"README.md differs from the results: run python recipes/benchmarks/{program} --render")
    atomic_write(README, rendered)
