"""Output directories survive kills and full disks whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.checkpoint import atomic
from hf_compress.checkpoint.atomic import atomic_directory, check_output, ensure_space, recover
from hf_compress.core.errors import OutputExistsError, WriteError

REPOSITORY = Path(__file__).parents[3]

# Forks one saving child per kill. An audit hook in the child reports every file operation and waits for leave
# to do it, so the kill falls exactly between two of them: no sleeping, and a seed gives the same kills again.
KILLER = '''
import hashlib, json, os, random, signal, sys
from pathlib import Path
from hf_compress.checkpoint.atomic import atomic_directory, recover

OPERATIONS = ("open", "os.", "shutil.", "fcntl.")
NAMES = ("config.json", "model.safetensors", "nested/extra.bin")
out = Path(sys.argv[1])


def content(version):
    files = {name: random.Random(f"{version}{name}").randbytes(5000) for name in NAMES}
    return files | {"hash": hashlib.sha256(b"".join(files.values())).hexdigest().encode()}


def save(version):
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "nested").mkdir()
        for name, data in content(version).items():
            (folder / name).write_bytes(data)


def whole(folder):
    files = [folder / name for name in NAMES]
    if not all(file.is_file() for file in (*files, folder / "hash")):
        return False
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest().encode()
    return found == (folder / "hash").read_bytes()


def child(first, steps, leave):
    def hook(event, arguments):
        if event.startswith(OPERATIONS):
            os.write(steps, b"s")
            os.read(leave, 1)
    sys.addaudithook(hook)
    save(first)
    save(first + 1)
    os.write(steps, b"d")
    os._exit(0)


def run(first, kill_at):
    """Saves twice in a child, killed before its operation `kill_at`; the number of operations done."""
    step_read, step_write = os.pipe()
    leave_read, leave_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(first, step_write, leave_read)
    done = 0
    while os.read(step_read, 1) == b"s":
        if done == kill_at:
            os.kill(pid, signal.SIGKILL)
            break
        done += 1
        os.write(leave_write, b"g")
    os.waitpid(pid, 0)
    for descriptor in (step_read, step_write, leave_read, leave_write):
        os.close(descriptor)
    return done


save(0)
operations = run(1, None)
generator = random.Random(20)
points = list(range(operations)) + [generator.randrange(operations) for _ in range(40)]
report = {"kills": 0, "operations": operations, "restored": 0, "absent": 0, "torn": [], "left": []}
old = out.parent / f".{out.name}.old"
for index, point in enumerate(points):
    run(10 * index, point)
    report["kills"] += 1
    report["absent"] += not out.exists()
    if not whole(out if out.exists() else old):
        report["torn"].append(point)
    report["restored"] += recover(out)
    if not whole(out):
        report["torn"].append(point)
    report["left"] += [f"{point} {name}" for name in os.listdir(out.parent) if name != out.name]
print(json.dumps(report))
'''

FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from hf_compress.checkpoint.atomic import atomic_directory
from hf_compress.core.errors import WriteError

if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
out = Path(sys.argv[1])
writers = {
    "plain": lambda folder: (folder / "config.json").write_bytes(bytes(4_000_000)),
    "safetensors": lambda folder: save_file({"weight": torch.zeros(1_000_000)}, folder / "model.safetensors"),
}
for name, write in writers.items():
    try:
        with atomic_directory(out, overwrite=True) as folder:
            write(folder)
    except WriteError as error:
        print(name, error)
    else:
        raise SystemExit(f"{name} was not refused")
"""


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stderr)
    return done.stdout


def make(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_sigkill_at_every_file_operation_never_tears_the_output(tmp_path: Path) -> None:
    report = json.loads(run_script(KILLER, str(tmp_path / "model")))
    assert report["kills"] >= 70
    assert report["torn"] == []
    assert report["left"] == []
    assert report["absent"] >= 1
    assert report["restored"] == report["absent"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_file_size_limit_is_a_write_error_and_leaves_the_old_output(tmp_path: Path) -> None:
    out = make(tmp_path / "model")
    said = run_script(FULL, str(out), "limit")
    assert said.count("[HFC704]") == 2
    assert all(text in said for text in ("File too large", "free on its disk", "Fix:"))
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_full_disk_is_a_write_error_and_leaves_the_old_output(tmp_path: Path) -> None:
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted: {mounted.stderr.strip()}")
    try:
        out = make(disk / "model")
        said = run_script(FULL, str(out), "disk")
        assert said.count("[HFC704]") == 2
        assert "No space left" in said
        assert str(out) in said
        assert names(disk) == ["model"]
        assert (out / "config.json").read_text() == "old"
        with pytest.raises(WriteError, match="mount point"):
            check_output(disk, overwrite=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_new_output_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "parent" / "model"
    with atomic_directory(out) as folder:
        (folder / "config.json").write_text("new")
        assert not out.exists()
        assert folder.name.startswith(f".model.tmp-{os.getpid()}-")
    assert (out / "config.json").read_text() == "new"
    assert names(out.parent) == ["model"]


def save_and_raise(out: Path, error: type[BaseException]) -> None:
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_any_exception_removes_the_temporary_directory(tmp_path: Path, error: type[BaseException]) -> None:
    out = make(tmp_path / "model")
    with pytest.raises(error):
        save_and_raise(out, error)
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_overwrite_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = make(tmp_path / "model")
    (out / "stale.bin").write_text("x")
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "hf_compress.json").write_text("new")
    assert names(out) == ["hf_compress.json"]
    assert names(tmp_path) == ["model"]


def test_empty_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path / "model") == ["config.json"]


def refused(out: Path, overwrite: bool) -> str:
    before = names(out.parent)
    with pytest.raises(OutputExistsError) as caught, atomic_directory(out, overwrite=overwrite):
        pytest.fail("the block ran")
    assert names(out.parent) == before
    return str(caught.value)


def test_existing_output_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = make(tmp_path / "model")
    assert "overwrite=True" in refused(out, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "model").write_text("precious")
    assert "is a file" in refused(tmp_path / "model", overwrite)


def test_directory_that_is_no_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    assert "no checkpoint" in refused(home, overwrite=True)


def test_other_outputs_have_other_markers(tmp_path: Path) -> None:
    """A comparison is no checkpoint, and neither replaces or restores the other."""
    comparison = tmp_path / "out"
    comparison.mkdir()
    (comparison / "comparison.json").write_text("old")
    assert "no checkpoint" in refused(comparison, overwrite=True)
    with atomic_directory(comparison, overwrite=True, markers=("comparison.json",)) as folder:
        (folder / "comparison.json").write_text("new")
    assert (comparison / "comparison.json").read_text() == "new"
    comparison.rename(tmp_path / ".out.old")
    assert not recover(comparison)
    assert recover(comparison, ("comparison.json",))
    model = make(tmp_path / "model")
    with (
        pytest.raises(OutputExistsError, match=r"holds no comparison\.json, so it is no comparison"),
        atomic_directory(model, overwrite=True, markers=("comparison.json",)),
    ):
        pytest.fail("the block ran")


@pytest.mark.parametrize("exists", [False, True])
def test_link_is_refused_and_names_its_target(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "elsewhere"
    if exists:
        make(target)
    (tmp_path / "model").symlink_to(target, target_is_directory=True)
    assert str(target) in refused(tmp_path / "model", overwrite=True)


def test_output_that_appears_during_the_save_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(OutputExistsError, match="exists already"), atomic_directory(out):
        make(out, "theirs")
    assert (out / "config.json").read_text() == "theirs"
    assert names(tmp_path) == ["model"]


def test_name_too_long_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="shorter name"), atomic_directory(tmp_path / ("m" * 250)):
        pytest.fail("the block ran")


def test_error_about_another_file_passes_unchanged(tmp_path: Path) -> None:
    source = str(tmp_path / "source" / "model.safetensors")
    with pytest.raises(PermissionError) as caught, atomic_directory(tmp_path / "model"):
        raise PermissionError(13, "Permission denied", source)
    assert caught.value.filename == source
    assert not isinstance(caught.value, WriteError)


def test_recover_restores_the_old_output(tmp_path: Path) -> None:
    make(tmp_path / ".model.old")
    assert recover(tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert not recover(tmp_path / "model")


def test_recover_restores_over_an_empty_directory(tmp_path: Path) -> None:
    make(tmp_path / ".model.old")
    (tmp_path / "model").mkdir()
    assert recover(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_recover_removes_a_leftover_old_output(tmp_path: Path) -> None:
    make(tmp_path / ".model.old")
    make(tmp_path / "model", "new")
    assert not recover(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_recover_keeps_the_old_output_beside_something_that_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / ".model.old")
    (tmp_path / "model").write_text("a note")
    assert not recover(tmp_path / "model")
    assert (tmp_path / ".model.old" / "config.json").read_text() == "old"


def test_recover_cleans_up_after_dead_processes_only(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    make(tmp_path / f".model.tmp-{dead.pid}-00000000")
    make(tmp_path / f".model.tmp-{os.getpid()}-00000000")  # a killed predecessor with our id, as in a container
    alive = make(tmp_path / f".model.tmp-{os.getppid()}-00000000")
    other = make(tmp_path / f".model2.tmp-{dead.pid}-00000000")
    user = make(tmp_path / ".model.tmp-notes")
    with atomic_directory(tmp_path / "model") as held:
        recover(tmp_path / "model")
        assert names(tmp_path) == sorted([alive.name, other.name, user.name, held.name])


def test_recover_without_a_parent(tmp_path: Path) -> None:
    assert not recover(tmp_path / "missing" / "model")


def test_ensure_space(tmp_path: Path) -> None:
    ensure_space(tmp_path / "missing" / "model", 1)
    with pytest.raises(WriteError, match="GB free"):
        ensure_space(tmp_path / "model", 10**18)
    assert atomic._free_bytes(tmp_path) > 0
