from dataclasses import dataclass

import pytest
from run_state import RUN_NAME, last_whole_checkpoint, prepare_output, require_same_training
from transformers.trainer_callback import TrainerState

from hf_r2 import R2TrainingArguments
from hf_r2.report import Manifest


@dataclass
class Recipe:
    name: str = "model"
    with_baseline: bool = True
    quantization: str = "uniform"
    overwrite: bool = False
    resume: bool = False


def arguments(output, **options):
    return R2TrainingArguments(str(output), report_to="none", use_cpu=True, **options)


def save_checkpoint(directory, step, processes=1):
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    for rank in range(processes):
        (checkpoint / ("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth")).touch()
    return checkpoint


def test_a_new_directory_notes_the_run(tmp_path):
    prepare_output(Recipe(), arguments(tmp_path / "new" / "run"))
    assert (tmp_path / "new" / "run" / RUN_NAME).is_file()


@pytest.mark.parametrize("left", ["float", "compressed", "baseline", "checkpoint-10"])
def test_an_earlier_run_is_neither_replaced_nor_resumed_unasked(tmp_path, left):
    prepare_output(Recipe(), arguments(tmp_path))
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=r"--resume true to go on with it, --overwrite true to replace it"):
        prepare_output(Recipe(), arguments(tmp_path))
    assert (tmp_path / left).is_dir()


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path):
    for name in ("float", "checkpoint-10", "notes", "checkpoint-best"):
        (tmp_path / name).mkdir()
    prepare_output(Recipe(overwrite=True), arguments(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "checkpoint-best", RUN_NAME}


def test_the_same_run_is_resumed_and_another_is_not(tmp_path):
    prepare_output(Recipe(), arguments(tmp_path))
    save_checkpoint(tmp_path, 10)
    prepare_output(Recipe(resume=True), arguments(tmp_path, logging_steps=3))
    with pytest.raises(ValueError, match=r"had other values of name, learning_rate, r2_clip"):
        prepare_output(Recipe("other", resume=True), arguments(tmp_path, learning_rate=1.0, r2_clip=2.0))


def test_a_run_without_its_notes_is_not_resumed(tmp_path):
    save_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match="had other values"):
        prepare_output(Recipe(resume=True), arguments(tmp_path))


def test_resuming_where_nothing_is_starts_anew(tmp_path):
    prepare_output(Recipe(resume=True), arguments(tmp_path))
    assert (tmp_path / RUN_NAME).is_file()


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    prepare_output(Recipe(), arguments(tmp_path))
    (tmp_path / "compressed").mkdir()
    manifest = Manifest()
    manifest.add("evaluate", rows=[])
    manifest.save(tmp_path / "compressed")
    with pytest.raises(SystemExit) as exit:
        prepare_output(Recipe(resume=True), arguments(tmp_path))
    assert exit.value.code == 0
    assert "holds the whole run already" in capsys.readouterr().out


def test_an_output_that_is_a_file_is_said_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare_output(Recipe(), arguments(tmp_path / "file" / "run"))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_newest_whole_checkpoint_is_found(tmp_path, processes):
    assert last_whole_checkpoint(tmp_path, processes) is None
    for step in (9, 10, 100):
        whole = save_checkpoint(tmp_path, step, processes)
    assert last_whole_checkpoint(tmp_path, processes) == str(whole)


@pytest.mark.parametrize("damage", ["without state", "half a state", "without random state", "one process short"])
def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path, damage):
    whole, cut = (save_checkpoint(tmp_path, step, processes=2) for step in (3, 6))
    if damage == "without state":
        (cut / "trainer_state.json").unlink()
    elif damage == "half a state":
        text = (cut / "trainer_state.json").read_text()
        (cut / "trainer_state.json").write_text(text[: len(text) // 2])
    elif damage == "without random state":
        for path in cut.glob("rng_state*"):
            path.unlink()
    else:
        (cut / "rng_state_1.pth").unlink()
    assert last_whole_checkpoint(tmp_path, processes=2) == str(whole)


def test_float_models_are_taken_from_a_run_with_the_same_training(tmp_path):
    prepare_output(Recipe(), arguments(tmp_path, r2_mode="clip"))
    other = Recipe("other", quantization="palette")
    with pytest.raises(ValueError, match="holds no float to take"):
        require_same_training(tmp_path, other, arguments(tmp_path / "new", r2_mode="clip"))
    (tmp_path / "float").mkdir()
    with pytest.raises(ValueError, match="holds no baseline/float to take"):
        require_same_training(tmp_path, other, arguments(tmp_path / "new", r2_mode="clip"))
    (tmp_path / "baseline" / "float").mkdir(parents=True)
    require_same_training(tmp_path, other, arguments(tmp_path / "new", r2_mode="clip"))
    with pytest.raises(ValueError, match="were trained with other values of r2_mode, seed"):
        require_same_training(tmp_path, other, arguments(tmp_path / "new", r2_mode="prox", seed=1))
    require_same_training(tmp_path, other, arguments(tmp_path / "new", r2_mode="prox", r2_aware="dkm"))
