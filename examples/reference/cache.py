"""A user cache of folders that are built once and appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

CACHE_VARIABLE = "HF_COMPRESS_CACHE"


def cache_root() -> Path:
    """The folder that holds all reference models and data.

    Returns:
        `$HF_COMPRESS_CACHE` where set, else `~/.cache/hf_compress/reference`.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hf_compress" / "reference"


def build_once(name: str, build: Callable[[Path], None], root: Path | None = None) -> Path:
    """Return the cached folder `name`, building it first where it is absent.

    The folder is built under a temporary name beside its final one and renamed when complete, so a reader
    never sees half of it. A lock makes a second process wait for the first one's result; where the file
    system has no working locks both build, and the first rename wins.

    Args:
        name: Name of the folder inside the cache. It should carry whatever its content depends on.
        build: Fills the empty folder it is given. Whatever it raises passes through, and the temporary
            folder is removed.
        root: The cache; `cache_root()` when omitted.

    Returns:
        The complete folder.
    """
    folder = root if root is not None else cache_root()
    target = folder / name
    if target.is_dir():
        return target
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{name}.lock"):
        if not target.is_dir():
            _build_and_rename(target, build)
    return target


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp's 0700 would survive the rename
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
