"""Mutated headers, configs and tensors: a ValueError or the same weights, never another error or a huge allocation."""

import copy
import json
import random
import shutil

import pytest
import torch
from checkpoint_models import assert_same_tensors, load, mixed, selected
from safetensors.torch import load_file, save_file

from hf_r2 import R2QuantizationConfig
from hf_r2.quantization.tensor_files import stored_tensors
from hf_r2.report.inspection import inspect_checkpoint

SETTINGS = mixed("resnet")
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 9, 64, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e300, "", "x", "8", "tensor"),
    *([], [1], [[]], ["*"], [["*", {}]], [["*", {"bits": 5}]], {}, {"bits": 3}, {"*": {"bits": 0}}),
)
CONFIGS = [
    SETTINGS,
    {"method": "palette", "bits": 4, "cluster_dim": 3, "grain": 5},
    {"method": "least_squares", "bits": 2, "basis": "ternary"},
    {
        "method": "palette",
        "bits": 2,
        "aware": "dkm",
        "aware_options": {"temperature": 0.01},
        "activations": {"bits": 4},
    },
    {"bits": 4, "range": "percentile", "refine": ["equalize"], "skip": ["classifier*"], "min_numel": 5},
]


def places(content, path=()):
    """List the paths of all values in nested JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(content, generator):
    """Change, remove or add one to three values of nested JSON."""
    content = copy.deepcopy(content)
    for _ in range(generator.randint(1, 3)):
        *path, key = generator.choice(list(places(content)) or [("x",)])
        parent = content
        for step in path:
            parent = parent[step]
        change = generator.random()
        if change < 0.2:
            del parent[key]
        elif change < 0.3 and isinstance(parent, dict):
            parent[generator.choice(["bitz", "shape", "dtype", "bits", "include", "data_offsets"])] = copy.deepcopy(
                generator.choice(VALUES)
            )
        else:
            parent[key] = copy.deepcopy(generator.choice(VALUES))
    return content


def read(path):
    """Split a safetensors file into its header and its data."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def sound(compressed_checkpoint):
    return compressed_checkpoint("resnet", **SETTINGS)


@pytest.fixture
def checkpoint(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_a_mutated_config_is_refused_or_sound(index):
    generator, content = random.Random(index), R2QuantizationConfig(**CONFIGS[index]).to_dict()
    refused = 0
    for _ in range(1000):
        changed = mutated(content, generator)
        try:
            config = R2QuantizationConfig(**changed)
        except ValueError:
            refused += 1
            continue
        assert R2QuantizationConfig(**json.loads(json.dumps(config.to_dict()))) == config, changed
        assert 1 <= config.settings_for("classifier.1.weight").bits <= 8
    assert 300 < refused < 1000


def test_a_mutated_header_is_refused_or_describes_what_the_file_holds(checkpoint):
    file, generator = checkpoint / "model.safetensors", random.Random(0)
    header, data = read(file)
    refused = 0
    for _ in range(1500):
        write(file, mutated(header, generator), data)
        try:
            stored = stored_tensors(file)
        except ValueError:
            refused += 1
            continue
        # Nothing that is read is larger than the file
        assert sum(tensor.nbytes for tensor in stored.values()) == len(data)
    assert refused > 1000


def test_a_file_of_mutated_bytes_is_refused_or_describes_what_the_file_holds(checkpoint):
    file, generator = checkpoint / "model.safetensors", random.Random(1)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for _ in range(1500):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(start)] = generator.randrange(256)
        file.write_bytes(changed)
        try:
            stored = stored_tensors(file)
        except ValueError:
            refused += 1
            continue
        assert sum(tensor.nbytes for tensor in stored.values()) == len(content) - start
    assert refused > 500


def mutate(checkpoint, sound, generator):
    """Change the config, the header or a tensor of a sound checkpoint."""
    config = json.loads((sound / "config.json").read_text())
    file = checkpoint / "model.safetensors"
    kind = generator.choice(["config", "header", "tensor"])
    if kind == "config":
        config["quantization_config"] = mutated(config["quantization_config"], generator)
        file.write_bytes((sound / "model.safetensors").read_bytes())
    elif kind == "header":
        header, data = read(sound / "model.safetensors")
        write(file, mutated(header, generator), data)
    else:
        tensors = load_file(sound / "model.safetensors")
        name = generator.choice(sorted(tensors))
        tensor = tensors[name].clone()
        edits = [
            lambda: tensor.reshape(-1)[:-1].clone(),
            lambda: torch.cat([tensor.reshape(-1)] * 2),
            lambda: tensor.double(),
            lambda: torch.zeros_like(tensor),
            lambda: tensor.reshape(1, -1).clone(),
            lambda: tensor.float().fill_(torch.nan),
        ]
        tensors[name] = generator.choice(edits)()
        save_file(tensors, file, metadata={"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    return kind


def is_quantized(checkpoint):
    """Tell whether config.json still names the method: without it the checkpoint is transformers' own to judge."""
    config = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == "hf_r2"


def test_inspecting_a_mutated_checkpoint_ends_in_statistics_or_a_value_error(checkpoint, sound):
    generator, outcomes = random.Random(2), {"refused": 0, "measured": 0}
    for _ in range(150):
        mutate(checkpoint, sound, generator)
        if not is_quantized(checkpoint):
            continue
        try:
            outcomes["measured"] += len(list(inspect_checkpoint(str(checkpoint)))) > 0
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_loading_a_mutated_checkpoint_ends_in_the_same_weights_or_a_value_error(seed, checkpoint, sound):
    generator, expected = random.Random(seed), selected(load("resnet", sound))
    refused = 0
    for _ in range(100):
        mutate(checkpoint, sound, generator)
        if not is_quantized(checkpoint):
            continue
        try:
            model = load("resnet", checkpoint)
        except ValueError:
            refused += 1
            continue
        assert_same_tensors(selected(model), expected)
    assert refused > 50
