"""Output directories that are old or new, never torn (DESIGN §3, "Atomic").

A save goes to a hidden sibling of the output, is flushed to disk and renamed. Overwriting moves the previous
output to `.NAME.old` first, so a process killed at any instant leaves the old output, the new one, or none
with `.NAME.old` beside it; `recover` puts that back. Leftovers of killed processes are told from live ones by
a lock that the kernel drops with its holder, since a process id alone repeats (each container starts at 1).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hf_compress.core.errors import HFCompressError, OutputExistsError, WriteError

if sys.platform != "win32":
    import fcntl

CHECKPOINT = ("config.json", "hf_compress.json")
"""Files of which one marks a directory as a checkpoint, which may be replaced on request."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FIXES = {
    errno.ENOSPC: "free some disk space, or save to another disk.",
    errno.EDQUOT: "your disk quota is used up: delete files, or save to another disk.",
    errno.EFBIG: "the file system or `ulimit -f` refuses files this large: raise it, or use smaller shards.",
    errno.EACCES: "choose a directory you may write to.",
    errno.EPERM: "choose a directory you may write to.",
    errno.EROFS: "the file system is read-only: save to another one.",
    errno.ENAMETOOLONG: "choose a shorter name.",
    errno.EEXIST: "a part of the path is a file: choose another path.",
    errno.ENOTDIR: "a part of the path is a file: choose another path.",
    errno.EBUSY: "the path is in use as a mount point: save to a directory inside it.",
    errno.EXDEV: "the path is on another file system than its parent: save to a directory inside it.",
    errno.EIO: "the disk reports errors: save to another one.",
}


def check_output(path: Path, overwrite: bool = False, markers: tuple[str, ...] = CHECKPOINT) -> Path:
    """Refuse an output path that is taken, before any work is done for it.

    Args:
        path: Where the output shall go. An empty directory counts as free.
        overwrite: Whether what is there may be replaced.
        markers: Files of which one must be there for that; those of a checkpoint by default.

    Returns:
        The absolute path, links in its parents resolved.

    Raises:
        OutputExistsError: The path is taken, is a link, or holds something else.
        WriteError: The path is a mount point, so nothing can be renamed onto it.
    """
    target = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
    if target.is_symlink():
        raise OutputExistsError(f"{target} is a link to {target.resolve()}.", f"save to {target.resolve()} itself.")
    if not target.exists():
        return target
    if not target.is_dir():
        raise OutputExistsError(f"{target} is a file.", "choose another path, or move the file away.")
    if target.is_mount():
        raise WriteError(f"{target} is a mount point; nothing can be moved onto it.", f"save to {target / 'model'}.")
    if _is_empty(target):
        return target
    if not overwrite:
        raise OutputExistsError(f"{target} exists already.", "choose another path, or pass overwrite=True.")
    if not _is_output(target, markers):
        lacks = f"neither {' nor '.join(markers)}" if len(markers) > 1 else f"no {markers[0]}"
        what = "checkpoint" if markers == CHECKPOINT else Path(markers[0]).stem
        raise OutputExistsError(
            f"{target} holds {lacks}, so it is no {what} and stays.",
            "choose another path, or delete the directory yourself.",
        )
    return target


def recover(path: Path, markers: tuple[str, ...] = CHECKPOINT) -> bool:
    """Put back what a killed save left: restore `.NAME.old`, or delete it and stale temporary siblings.

    Args:
        path: The output path a save may have been interrupted at.
        markers: See `check_output`.

    Returns:
        Whether the previous output was restored.

    Raises:
        WriteError: The previous output is there but can't be renamed back.
    """
    with disk_errors(path):
        path = path.resolve()
        if not path.parent.is_dir():
            return False
        path.lstat() if path.is_symlink() else path.exists()
    for stale in _stale_siblings(path):
        shutil.rmtree(stale, ignore_errors=True)
    old = _old(path)
    if old.is_symlink() or not _is_output(old, markers):
        return False
    # An empty directory may have been made by a script after the kill; the only copy is still the old one.
    if path.exists() and not _is_empty(path):
        if _is_output(path, markers):
            _discard(old)
        return False
    with disk_errors(path):
        old.replace(path)
        sync(path.parent)
    return True


def ensure_space(path: Path, needed_bytes: int) -> None:
    """Refuse early when the disk under `path` can't hold `needed_bytes`.

    Args:
        path: Where the output shall go; it and its parents need not exist.
        needed_bytes: Size of everything to be written, in bytes.

    Raises:
        WriteError: There is less free space than needed.
    """
    free = _free_bytes(path)
    if free < needed_bytes:
        raise WriteError(
            f"{path} needs {_size(needed_bytes)}, and its disk has {_size(free)} free.",
            _FIXES[errno.ENOSPC],
        )


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False, markers: tuple[str, ...] = CHECKPOINT) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends without an error.

    Args:
        path: The output directory. Missing parents are made.
        overwrite: Whether what is there is replaced.
        markers: See `check_output`.

    Yields:
        The empty directory to write into.

    Raises:
        OutputExistsError: See `check_output`; raised before anything is written.
        WriteError: The disk is full or not writable. The old output is untouched, nothing else left.
    """
    recover(path, markers)
    target = check_output(path, overwrite, markers)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            with held(temporary):
                yield temporary
                _sync_tree(temporary)
                _commit(temporary, check_output(target, overwrite, markers))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or unwritable disk inside the block into `WriteError`; others pass unchanged.

    safetensors wraps the operating system's error in its own `SafetensorError` with "(os error N)".

    Args:
        path: The output the message names.
    """
    try:
        yield
    except HFCompressError:
        raise
    except OSError as error:
        if error.errno not in _FIXES or not _concerns(error, path):
            raise
        raise _write_error(path, error.errno) from error
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None or int(found.group(1)) not in _FIXES:
            raise
        raise _write_error(path, int(found.group(1))) from error


def _write_error(path: Path, number: int) -> WriteError:
    reason = f"{os.strerror(number)} ({_size(_free_bytes(path))} free on its disk)"
    return WriteError(f"Writing {path} failed: {reason}. Nothing was left behind.", _FIXES[number])


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about the output: one about a source file read in the block must stay itself."""
    named = [Path(name).absolute() for name in (error.filename, error.filename2) if isinstance(name, str)]
    own = (f".{path.name}.tmp-", f".{path.name}.old")
    for found in named:
        if path.is_relative_to(found) or found.is_relative_to(path):
            return True
        if found.is_relative_to(path.parent) and found.relative_to(path.parent).parts[0].startswith(own):
            return True
    return not named


def _commit(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, by way of `.NAME.old` where something is replaced."""
    old = _old(target)
    replaced = target.exists() and not _is_empty(target)
    if sys.platform == "win32" and target.exists() and not replaced:
        target.rmdir()
    try:
        if replaced:
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        if replaced and old.exists() and not target.exists():
            old.rename(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            taken = old if old.exists() else target
            raise OutputExistsError(f"{taken} appeared during the save.", "save to another path.") from error
        raise
    sync(target.parent)
    if replaced:
        _discard(old)


def _discard(directory: Path) -> None:
    """Delete a directory under another name first, so that no half-deleted `.NAME.old` is ever restored."""
    name = directory.name.removeprefix(".").removesuffix(".old")
    doomed = _temporary(directory.parent / name)
    # Another process may be doing the same; a directory we may not rename stays for the next save.
    with suppress(FileNotFoundError, PermissionError):
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _is_output(path: Path, markers: tuple[str, ...]) -> bool:
    return any((path / marker).is_file() for marker in markers)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _stale_siblings(path: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-(\d+)-[0-9a-f]{{8}}")
    with suppress(PermissionError):
        found = [(entry, pattern.fullmatch(entry.name)) for entry in path.parent.iterdir()]
        return [entry for entry, match in found if match and _is_abandoned(entry, int(match.group(1)))]
    return []


def _is_abandoned(directory: Path, pid: int) -> bool:
    """Whether the process that made the temporary directory is gone."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    if sys.platform == "win32":
        return False  # no directory locks there, and `os.kill(pid, 0)` would send Ctrl-C
    if pid != os.getpid() and _is_alive(pid):
        return False
    with suppress(OSError), held(directory):
        return True
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the lock that says the directory is in use.

    Raises:
        BlockingIOError: Another holder has it.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Flush every file, then the directories that name them, deepest first."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Have the system write a file or a directory to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't flush a directory; its files are flushed by then.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count} bytes"
