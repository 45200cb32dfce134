"""Writing files and folders so that an interruption leaves what was there before."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary sibling of a directory and put it in its place only when the block ends without an error.

    An existing directory is replaced as a whole; it stays untouched if the block fails or is interrupted.

    Raises:
        ValueError: if the path is a file.
    """
    target = _replaceable(directory)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        _replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def resumable_directory(directory: str | os.PathLike[str], key: Mapping[str, Any]) -> Iterator[Path]:
    """Fill a directory as [`atomic_directory`] does, but keep what an interrupted block has finished for the next one.

    Files whose names begin with a dot are notes of the block: they never reach the directory, and alone are not worth
    keeping.

    Args:
        directory: the directory.
        key: plain JSON that says what it is filled with; what was left by a block of another key is thrown away.

    Raises:
        ValueError: if the path is a file.
    """
    target = _replaceable(directory)
    scratch = target.with_name(f".{target.name}.unfinished")
    note, text = scratch / ".key.json", json.dumps(key, sort_keys=True)
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    atomic_write(note, text)
    try:
        yield scratch
        _replace(scratch, target)
        for file in target.glob(".*"):
            file.unlink()
    except BaseException:
        if scratch.exists() and all(file.name.startswith(".") for file in scratch.iterdir()):
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _replaceable(directory: str | os.PathLike[str]) -> Path:
    target = Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a directory")
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} cannot be replaced as a whole (in use or a mount point); choose a folder inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _replace(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    # A folder with files cannot be renamed over: move the old one aside, and back if the new one cannot take its place
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = aside / target.name
    try:
        target.rename(old)
        try:
            scratch.rename(target)
        except BaseException:
            old.rename(target)
            raise
    except BaseException:
        with suppress(OSError):  # it holds the old folder if even that could not be moved back
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def weight_file_bytes(directory: str | os.PathLike[str]) -> int:
    """Add up the bytes of a checkpoint directory's weight files; 0 if there are none."""
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file through a temporary sibling, so that readers see the old content or the new one; text as UTF-8."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
