"""Writing files and folders so that an interruption leaves what was there before."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary sibling of a directory and put it in its place only when the block ends without an error.

    An existing directory is replaced as a whole; it stays untouched if the block fails or is interrupted.

    Raises:
        ValueError: if the path is a file.
    """
    target = Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a directory")
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} cannot be replaced as a whole (in use or a mount point); choose a folder inside it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        _replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def atomic_write(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through a temporary sibling, so that readers see the old text or the new one."""
    target = Path(path)
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
