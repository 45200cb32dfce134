"""The benchmark of large models makes, kills, resumes and measures, and its README says what it measured."""

import pytest
import torch
from benchmarks import measuring
from benchmarks import scale as benchmark
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

SMALL = {**benchmark.SIZES["small"]["causal"], "tie_word_embeddings": True}


def run(cpu_s, megabytes):
    return {"cpu_s": cpu_s, "peak_bytes": 1e6 * megabytes, "wall_s": 2 * cpu_s}


@pytest.fixture
def result():
    causal = {
        "weights": 2_000_000_000,
        "float_bytes": 4_000_000_000,
        "packed_bytes": 1_000_000_000,
        "shards": 8,
        "idle": run(5.0, 400),
        "read": run(6.0, 410),
        "compress": {"killed": run(30.0, 900), "kept_shards": 2, "resumed": run(80.0, 1100)},
        "inspect": run(25.0, 700),
    }
    row = {"file_bytes": 400e6, "load_s": 2.0, "peak_bytes": 500e6, "held_bytes": 450e6, "forward_s": 0.1}
    reload = {"float": row, "decoded": {**row, "load_s": 3.0}, "packed": {**row, "held_bytes": 45e6}}
    return {**measuring.facts(2), "causal": causal, "reload": reload}


@pytest.fixture
def floats(tmp_path):
    weights = benchmark.make_checkpoint(Qwen2Config(**SMALL), tmp_path / "float", 200_000)
    return tmp_path / "float", weights


def test_the_made_checkpoint_is_one_that_transformers_loads(floats):
    directory, weights = floats
    shards = list(directory.glob("model-*.safetensors"))
    assert len(shards) > 3
    model, info = Qwen2ForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert sum(tensor.numel() for shard in shards for tensor in load_file(shard).values()) == weights


@pytest.mark.slow
def test_a_killed_compression_is_taken_up_and_measured(floats, tmp_path):
    directory, _ = floats
    runs = benchmark.compress_through_a_kill(directory, tmp_path / "packed", threads=1)
    assert runs["kept_shards"] >= 2
    assert (tmp_path / "packed/config.json").is_file()
    for figures in (runs["killed"], runs["resumed"]):
        assert figures["cpu_s"] > 0
        assert figures["peak_bytes"] > 50e6


def test_tables_say_which_bars_are_met(result):
    lines = [
        [cell.strip() for cell in line.split("|")] for line in benchmark.causal_table(result["causal"]).splitlines()
    ]
    compress, inspect = lines[4], lines[5]
    assert compress[1] == "compress, killed once (2 of 8 shards kept)"
    assert compress[2:] == ["≤ 1500 MB", "met", "1,100", "100.0", "20.0", ""]
    assert inspect[2:] == ["≤ 600 MB", "missed", "700", "20.0", "100.0", ""]
    packed = [cell.strip() for cell in benchmark.reload_table(result["reload"]).splitlines()[-1].split("|")]
    assert packed[1:] == ["packed", "400.0 MB", "2.00 s", "1.00", "1.00", "1.00", "0.10", "1.00", ""]


def test_rendering_replaces_what_is_between_the_markers(result, tmp_path):
    measuring.save(result, tmp_path / "scale-cpu-2.json")
    readme = f"before\n{benchmark.BEGIN}\n\nold\n\n{benchmark.END}\nafter\n"
    assert benchmark.render_readme(readme, tmp_path) == readme.replace("old", benchmark.render(result))


def test_readme_tables_are_rendered_from_the_results():
    text = (benchmark.HERE / "README.md").read_text(encoding="utf-8")
    assert benchmark.render_readme(text, benchmark.HERE / "results") == text
