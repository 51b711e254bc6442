"""Environments of the peers: made from scratch with pip, once, under the user cache.

Their pins exclude each other's and ours, so each tool has an environment of its own. `python -m
benchmarks.peers.environments` makes them all (some minutes and 3 GB); a program that needs one calls `python_of`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from examples.reference.cache import build_once, cache_root
from examples.reference.packages import ReferenceUnavailable

INSTALL_TIMEOUT_S = 3600
TORCH = "torch==2.13.0"
CPU_WORKERS = {"GPTQMODEL_CPU_WORKERS": "2"}
"""GPTQModel refuses machines with fewer than three cores unless told how many workers to start."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """What is installed into an environment.

    Args:
        name: Name of the environment.
        steps: Arguments of `pip install`, one call after the other; torch comes first.
        imports: What must be importable afterwards.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    imports: tuple[str, ...]


GPTQMODEL_NEEDS = (
    *("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "optimum==2.3.0", "torchao==0.18.0"),
    *("numpy", "safetensors==0.8.0", "threadpoolctl", "packaging", "device-smi==0.5.7", "protobuf", "pillow"),
    *("requests", "pypcre==0.6.4", "tokenicer==0.0.14", "logbar==0.4.15", "jinja2", "ninja", "maturin", "pyarrow"),
    *("dill", "defuser==0.0.28"),
)
"""GPTQModel 7.7 asks for a newer torch than the one used here; it runs with this one if its other needs are met."""

ENVIRONMENTS = {
    spec.name: spec
    for spec in (
        EnvironmentSpec(
            name="llm-compressor",
            steps=(
                (TORCH,),
                (TORCH, "llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0"),
                (TORCH, "auto-round==0.15.1", "transformers==5.17.0", "compressed-tensors==0.19.0"),
            ),
            imports=("llmcompressor", "auto_round"),
        ),
        EnvironmentSpec(
            name="gptqmodel",
            steps=((TORCH,), (TORCH, *GPTQMODEL_NEEDS), ("--no-deps", "gptqmodel==7.7.0")),
            imports=("gptqmodel",),
        ),
    )
}


def peers_root() -> Path:
    """The folder of the environments, beside that of the reference models."""
    return cache_root().parent / "peers"


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made first where it is absent.

    Args:
        name: A key of `ENVIRONMENTS`.

    Raises:
        ReferenceUnavailable: pip failed, or a package does not import; the message has the last lines of it.
    """
    spec = ENVIRONMENTS[name]
    folder = build_once(name, lambda target: _install(spec, target), peers_root())
    return folder / "bin" / "python"


def _install(spec: EnvironmentSpec, folder: Path) -> None:
    """Fill a folder with an environment, and import what it is for."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    for step in spec.steps:
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *step]
        _run(spec.name, command)
    _run(spec.name, [str(python), "-c", "import " + ", ".join(spec.imports)])


def _run(name: str, command: list[str]) -> None:
    """Run a command, with its complaint in the error if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=INSTALL_TIMEOUT_S,
        check=False,
        env=child_environment(),
    )
    if done.returncode != 0:
        raise ReferenceUnavailable(f"the environment {name}", " ".join(done.stderr.split())[-900:])


def child_environment(threads: int = 2, path: Path | None = None) -> dict[str, str]:
    """Environment variables of every process of a peer and of ours: the same threads, no network.

    Args:
        threads: Of OpenMP and MKL.
        path: Where more modules are found.
    """
    return {
        **os.environ,
        **CPU_WORKERS,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": "" if path is None else str(path),
    }


def main() -> int:
    """Make all environments, and say where they are."""
    for name in ENVIRONMENTS:
        print(f"{name}: {python_of(name)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
