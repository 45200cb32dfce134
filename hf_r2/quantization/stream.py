"""Post-training compression shard by shard and tensor by tensor: memory follows the largest tensor, not the model.

The float files are read one tensor at a time, encoded by a few threads, and written to shards of the same names. A
shard gets its name when it is whole, and is noted in a record with its SHA-256; after an interruption the next run with
the same source and config begins with the shards that are there.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_r2.codecs import Encoded, encode
from hf_r2.codecs.encoded import blank
from hf_r2.files import atomic_write
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.hf_quantizer import R2HfQuantizer, unsaved
from hf_r2.quantization.integrity import content_digests
from hf_r2.quantization.skeleton import skeleton
from hf_r2.quantization.tensor_files import (
    DTYPE_WORDS,
    DTYPES,
    StoredTensor,
    TensorWriter,
    checkpoint_files,
    stored_tensors,
)
from hf_r2.quantization.workers import Workers, start_workers
from hf_r2.report.facts import weight_facts
from hf_r2.selection import output_first

RECORD = ".progress.json"


class NotStreamable(ValueError):
    """A checkpoint or a config that takes the whole model at a time; the text says why."""


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Args:
        model: the model's structure, on the meta device.
        config: how its weights are compressed.
        shards: the float tensors that the compressed checkpoint keeps, by file name and tensor name.
        weights: what each compressed weight becomes, on the meta device, by name in the order of the selection.
        turned: names of weights whose output channels are the second dimension.
        source_files: name, bytes and time of change of every float file.
    """

    model: PreTrainedModel
    config: R2QuantizationConfig
    shards: dict[str, dict[str, StoredTensor]]
    weights: dict[str, Encoded]
    turned: set[str]
    source_files: list[tuple[str, int, int]]

    @property
    def float_bytes(self) -> int:
        """Bytes of the float files."""
        return sum(size for _, size, _ in self.source_files)

    @property
    def key(self) -> dict[str, Any]:
        """What an unfinished run must have in common with this one to be continued."""
        return {"source": self.source_files, "config": self.config.to_dict()}


def plan_stream(source: str, config: R2QuantizationConfig) -> Plan:
    """Read the structure and the headers of a float checkpoint, and lay out what it becomes.

    Args:
        source: directory or Hub name.
        config: how its weights are compressed.

    Raises:
        NotStreamable: if a step of `refine` changes float weights or looks at the model, and if transformers would
            rename, convert, cast or initialize tensors while loading.
        ValueError: as `select_weights` does, and for damaged files.
    """
    config = R2QuantizationConfig(**{**config.to_dict(), "sha256": None})
    if config.refine:
        raise NotStreamable(f"refine={config.refine} works on the whole model")
    try:
        files = checkpoint_files(source)
    except ValueError as error:
        raise NotStreamable(str(error)) from error
    model = skeleton(source)
    if any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)):
        raise NotStreamable(f"transformers converts tensors of {type(model).__name__} while it loads them")
    quantizer = R2HfQuantizer(config, pre_quantized=False)
    selection = quantizer.selection(model)
    quantizer.quantize_inputs(model, selection)

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in unsaved(model)}
    names = [SAFE_WEIGHTS_NAME] if len(files) == 1 else [file.name for file in files]
    shards = {name: stored_tensors(file) for name, file in zip(names, files, strict=True)}
    found = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    _require_plain(model, expected, found)
    kept = {
        shard: {name: tensor for name, tensor in tensors.items() if name in expected}
        for shard, tensors in shards.items()
    }
    weights, turned = {}, set()
    for name, (module, attribute) in selection.items():
        shape = output_first(module, getattr(module, attribute)).shape
        weights[name] = blank(shape, DTYPES[found[name].dtype], config.settings_for(name))
        if output_first(module, getattr(module, attribute)) is not getattr(module, attribute):
            turned.add(name)
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Plan(model, config, kept, weights, turned, states)


def _require_plain(
    model: PreTrainedModel, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor]
) -> None:
    """Raise NotStreamable unless loading would take the tensors that are found just as they are."""
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise NotStreamable(f"the files do not have {missing[0]!r}: it has another name there, or is missing")
    both = sorted(found.keys() & model.all_tied_weights_keys.keys())
    if both:
        raise NotStreamable(f"the files hold {both[0]!r}, which is tied to another tensor of theirs")
    dtype = str(model.config.dtype).removeprefix("torch.")
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.shape != shape or tensor.dtype not in DTYPES:
            raise NotStreamable(f"{name!r} is {tensor.dtype} {tensor.shape}, the model has {shape}")
        stored = DTYPES[tensor.dtype]
        if stored.is_floating_point and str(stored).removeprefix("torch.") != dtype:
            raise NotStreamable(f"{name!r} is stored in {stored}, and config.json asks for {dtype}")


class Streamed(NamedTuple):
    """What was written, for the manifest.

    Args:
        config: the config that the checkpoint has, with its digests.
        weights: the facts of every weight.
        seconds: that this and the interrupted runs took.
    """

    config: R2QuantizationConfig
    weights: list[dict[str, Any]]
    seconds: float


def run_stream(plan: Plan, source: str, scratch: Path, workers: int | None = None) -> Streamed:
    """Write the shards, their index and the configs into a directory that may hold some of them already.

    Args:
        plan: see [`plan_stream`].
        source: the float checkpoint, for its generation config.
        scratch: the directory.
        workers: threads that encode, each with one tensor at a time; as many as torch may use without.
    """
    record = _Record(scratch)
    sizes = {
        shard: sum(plan.weights[name].shape.numel() for name in tensors.keys() & plan.weights.keys())
        for shard, tensors in plan.shards.items()
    }
    left = [shard for shard in plan.shards if not record.holds(shard)]
    done = sum(sizes.values()) - sum(sizes[shard] for shard in left)
    with (
        tqdm(total=sum(sizes.values()), initial=done, desc="Compressing", unit=" weights", unit_scale=True) as bar,
        start_workers(workers) as pool,
    ):
        for shard in left:
            record.add(shard, _write_shard(plan, shard, scratch / shard, pool, bar))
    _write_index(plan, scratch)
    config = _write_configs(plan, source, scratch)
    facts = record.facts()
    return Streamed(config, [facts[name] for name in plan.weights], record.seconds)


def _write_shard(plan: Plan, shard: str, path: Path, pool: Workers, bar: tqdm) -> list[dict[str, Any]]:
    tensors = plan.shards[shard]
    weights = [name for name in tensors if name in plan.weights]
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items() if name not in plan.weights}
    for name in weights:
        for key, tensor in plan.weights[name].tensors(name).items():
            layout[key] = (DTYPE_WORDS[tensor.dtype], tuple(tensor.shape))

    def compress(name: str) -> tuple[str, Encoded, dict[str, Any]]:
        stored = tensors[name].read()
        weight = stored.T if name in plan.turned else stored
        encoded = encode(weight, plan.config, name)
        return name, encoded, weight_facts(name, weight, stored.shape, encoded)

    facts, written = [], 0
    with TensorWriter(path, layout) as writer:
        for name, encoded, fact in pool.in_order(compress, weights):
            for key, tensor in encoded.tensors(name).items():
                writer.write(key, tensor)
            facts.append(fact)
            written += encoded.nbytes
            bar.set_postfix_str(f"{shard}: {written / 1e6:.1f} MB", refresh=False)
            bar.update(encoded.shape.numel())
        for name in tensors.keys() - plan.weights.keys():
            writer.copy(name, tensors[name])
    return facts


def _write_index(plan: Plan, scratch: Path) -> None:
    """Write the index of shards; a single one needs none."""
    if len(plan.shards) == 1:
        return
    layout = {shard: stored_tensors(scratch / shard) for shard in plan.shards}
    size = sum(tensor.nbytes for tensors in layout.values() for tensor in tensors.values())
    names = {name: shard for shard, tensors in layout.items() for name in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
    atomic_write(scratch / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _write_configs(plan: Plan, source: str, scratch: Path) -> R2QuantizationConfig:
    """Write config.json with the digests of what was written, and the generation config, as `save_pretrained` does."""
    stored = {name: t for file in scratch.glob("*.safetensors") for name, t in stored_tensors(file).items()}
    packed = {key for name, encoded in plan.weights.items() for key in encoded.tensors(name)}
    codes = _Stored({name: tensor for name, tensor in stored.items() if name in packed})
    rest = _Stored({name: tensor for name, tensor in stored.items() if name not in packed})
    config = R2QuantizationConfig(**plan.config.to_dict())
    config.sha256 = content_digests(plan.weights, codes, rest)
    model = plan.model
    model.config.quantization_config = config
    model.config.dtype = str(model.config.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(scratch)
    if model.can_generate():
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:  # the float checkpoint has none
            generation = model.generation_config
        generation.save_pretrained(scratch)
    return config


class _Stored(Mapping[str, Tensor]):
    """Stored tensors by name, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Record:
    """Which shards are finished, with their SHA-256 and the facts of their weights, kept in a file beside them."""

    def __init__(self, scratch: Path) -> None:
        self._path = scratch / RECORD
        self._start = time.perf_counter()
        self._content: dict[str, Any] = {"shards": {}, "seconds": 0.0}
        if self._path.is_file():
            self._content = json.loads(self._path.read_text(encoding="utf-8"))
        self._before = self._content["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds that all runs took so far, those of interrupted ones up to their last finished shard."""
        return self._before + time.perf_counter() - self._start

    def holds(self, shard: str) -> bool:
        """Tell whether a shard is finished, and still what was written."""
        entry, path = self._content["shards"].get(shard), self._path.with_name(shard)
        return entry is not None and path.is_file() and file_digest(path) == entry["sha256"]

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return the facts of all weights by name."""
        return {fact["name"]: fact for entry in self._content["shards"].values() for fact in entry["facts"]}

    def add(self, shard: str, facts: list[dict[str, Any]]) -> None:
        """Note a shard that has just been written."""
        self._content["shards"][shard] = {"sha256": file_digest(self._path.with_name(shard)), "facts": facts}
        self._content["seconds"] = self.seconds
        atomic_write(self._path, json.dumps(self._content))


def file_digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
