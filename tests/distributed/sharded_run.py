"""Compares cut layers with whole ones in every process of a launch: `sharded_run.py DIRECTORY`.

Process R writes `DIRECTORY/result-R.json`: by case, what it found.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from sharded_cases import LAYOUTS, all_cases, cut, make_layers, measure


def compare(layout, method, grain, dtype):
    """The largest difference to whole layers by result, in units of 1 + |result|; and what the processes disagree on.

    Results that only one has are infinitely far.
    """
    expected = measure(make_layers(getattr(torch, dtype)), method, grain)
    found = measure(cut(make_layers(getattr(torch, dtype)), layout), method, grain)
    differences = dict.fromkeys(expected.keys() ^ found.keys(), float("inf"))
    for name in expected.keys() & found.keys():
        one, other = found[name].double(), expected[name].double()
        differences[name] = ((one - other).abs() / (1 + other.abs())).max().item()
    return {"differences": differences, "disagreements": [name for name in sorted(found) if not agreed(found[name])]}


def agreed(tensor):
    """Tell whether both processes have the same tensor, bit for bit."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    return torch.equal(*both)


def main(directory, rank):
    results = {
        "empty": {
            layout: [name for name, layer in cut(make_layers(torch.float32), layout).items() if is_empty(layer.weight)]
            for layout in LAYOUTS
        }
    }
    for name, case in all_cases().items():
        try:
            results[name] = compare(*case)
        except Exception:
            # An error in all processes spoils this case alone; after one in a single process the launch fails
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc()}
    (directory / f"result-{rank}.json").write_text(json.dumps(results))


def is_empty(weight):
    return weight.to_local().numel() == 0


if __name__ == "__main__":
    state = PartialState(cpu=True, timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]), state.process_index)
    state.wait_for_everyone()
    # Leave without the interpreter's teardown, in which gloo's threads abort the process now and then
    sys.stdout.flush()
    os._exit(0)
