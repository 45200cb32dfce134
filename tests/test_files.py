import subprocess
import sys
from pathlib import Path

import pytest

from hf_r2 import files
from hf_r2.files import atomic_directory, atomic_write, resumable_directory

# Loads the module by its path, as importing the package takes seconds
STALLED_WRITER = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.atomic_directory(sys.argv[2]) as scratch:
    (scratch / "weights.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def old(tmp_path):
    directory = tmp_path / "checkpoint"
    (directory / "nested").mkdir(parents=True)
    (directory / "config.json").write_text("old config")
    (directory / "nested" / "weights.bin").write_bytes(bytes(range(256)))
    return directory


def content(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def fail_inside(directory, error):
    with atomic_directory(directory) as scratch:
        (scratch / "config.json").write_text("new config")
        raise error


def kill_a_writer(directory):
    command = [sys.executable, "-c", STALLED_WRITER, files.__file__, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.kill()


def refuse_rename_of(monkeypatch, refused):
    rename = Path.rename

    def guarded(self, target):
        if refused(self):
            raise OSError("device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", guarded)


def test_a_new_directory_appears_with_its_parents(tmp_path):
    with atomic_directory(tmp_path / "runs" / "checkpoint") as scratch:
        (scratch / "config.json").write_text("new")
    assert content(tmp_path / "runs" / "checkpoint") == {"config.json": b"new"}


def test_the_target_does_not_exist_before_the_block_ends(tmp_path):
    with atomic_directory(tmp_path / "checkpoint"):
        assert not (tmp_path / "checkpoint").exists()


def test_success_replaces_the_whole_directory(old):
    with atomic_directory(old) as scratch:
        (scratch / "model.safetensors").write_bytes(b"new")
    assert content(old) == {"model.safetensors": b"new"}


def test_success_leaves_no_scratch_directories(old):
    with atomic_directory(old) as scratch:
        (scratch / "model.safetensors").write_bytes(b"new")
    assert names(old.parent) == ["checkpoint"]


def test_a_path_may_be_given_as_a_string(old):
    with atomic_directory(f"{old}/") as scratch:
        (scratch / "model.safetensors").write_bytes(b"new")
    assert content(old) == {"model.safetensors": b"new"}


def test_a_directory_is_readable_by_others(tmp_path):
    with atomic_directory(tmp_path / "checkpoint"):
        pass
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_comes_through(old, error):
    with pytest.raises(error):
        fail_inside(old, error())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_directory_as_it_was(old, error):
    before = content(old)
    with pytest.raises(error):
        fail_inside(old, error())
    assert content(old) == before


def test_an_error_in_the_block_leaves_no_scratch_directories(old):
    with pytest.raises(RuntimeError):
        fail_inside(old, RuntimeError())
    assert names(old.parent) == ["checkpoint"]


def test_an_error_in_the_block_leaves_no_new_directory(tmp_path):
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "checkpoint", RuntimeError())
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_directory_raises_before_the_block(tmp_path):
    (tmp_path / "checkpoint").write_text("a file")
    with pytest.raises(ValueError, match="is a file; choose a directory"):
        fail_inside(tmp_path / "checkpoint", AssertionError("the block ran"))


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_place(old, monkeypatch):
    before = content(old)
    refuse_rename_of(monkeypatch, lambda path: ".partial-" in path.name)
    with pytest.raises(OSError, match="busy"), atomic_directory(old) as scratch:
        (scratch / "config.json").write_text("new config")
    assert content(old) == before


@pytest.mark.parametrize("refused", ["checkpoint", ".checkpoint.partial-"])
def test_a_refused_rename_leaves_no_scratch_directories(old, monkeypatch, refused):
    refuse_rename_of(monkeypatch, lambda path: path.name.startswith(refused))
    with pytest.raises(OSError, match="busy"), atomic_directory(old) as scratch:
        (scratch / "config.json").write_text("new config")
    assert names(old.parent) == ["checkpoint"]


def test_the_old_files_survive_if_no_rename_back_is_possible(old, monkeypatch):
    before = content(old)
    refuse_rename_of(monkeypatch, lambda path: ".partial-" in path.name or ".old-" in path.parent.name)
    with pytest.raises(OSError, match="busy"), atomic_directory(old) as scratch:
        (scratch / "config.json").write_text("new config")
    assert set(before.values()) <= set(content(old.parent).values())


def test_a_killed_process_leaves_the_old_directory_as_it_was(old):
    before = content(old)
    kill_a_writer(old)
    assert content(old) == before


def test_a_killed_process_leaves_no_new_directory(tmp_path):
    kill_a_writer(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_directory_can_be_written_after_a_killed_process(old):
    kill_a_writer(old)
    with atomic_directory(old) as scratch:
        (scratch / "model.safetensors").write_bytes(b"new")
    assert content(old) == {"model.safetensors": b"new"}


def stop_after(target, key, *files):
    with pytest.raises(KeyboardInterrupt), resumable_directory(target, key) as scratch:
        for name in files:
            (scratch / name).write_text(name)
        raise KeyboardInterrupt


def test_an_interrupted_resumable_directory_keeps_its_files_for_the_same_key(old):
    before = content(old)
    stop_after(old, {"a": 1}, "one", ".note")
    assert content(old) == before
    with resumable_directory(old, {"a": 1}) as scratch:
        assert {"one", ".note"} <= set(names(scratch))
        (scratch / "two").write_text("two")
    assert content(old) == {"one": b"one", "two": b"two"}
    assert names(old.parent) == ["checkpoint"]


def test_a_resumable_directory_of_another_key_starts_empty(old):
    stop_after(old, {"a": 1}, "one")
    with resumable_directory(old, {"a": 2}) as scratch:
        assert "one" not in names(scratch)
    assert content(old) == {}


def test_an_interrupted_resumable_directory_without_finished_files_leaves_nothing(old):
    stop_after(old, {"a": 1}, ".note")
    assert names(old.parent) == ["checkpoint"]


def test_a_resumable_directory_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "checkpoint").write_text("a file")
    with pytest.raises(ValueError, match="is a file; choose a directory"):
        stop_after(tmp_path / "checkpoint", {}, "one")


def test_a_resumable_directory_that_cannot_take_its_place_is_kept(old, monkeypatch):
    before = content(old)
    refuse_rename_of(monkeypatch, lambda path: path.name.startswith("."))
    with pytest.raises(OSError, match="busy"), resumable_directory(old, {}) as scratch:
        (scratch / "one").write_text("one")
    assert content(old) == before
    monkeypatch.undo()
    with resumable_directory(old, {}) as scratch:
        assert "one" in names(scratch)


def test_atomic_write_makes_a_utf8_file(tmp_path):
    atomic_write(tmp_path / "card.md", "λ → 0\n")
    assert (tmp_path / "card.md").read_bytes() == "λ → 0\n".encode()


def test_atomic_write_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    atomic_write(tmp_path / "card.md", "old, and longer")
    atomic_write(tmp_path / "card.md", "new")
    assert content(tmp_path) == {"card.md": b"new"}


def test_atomic_write_that_fails_keeps_the_old_file_alone(tmp_path):
    atomic_write(tmp_path / "card.md", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "card.md", "\ud800")
    assert content(tmp_path) == {"card.md": b"old"}
