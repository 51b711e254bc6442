"""`hf-compress doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from .. import _version
from . import options
from .output import Output, size

if TYPE_CHECKING:
    from ..evaluation.environment import Environment

NAME = "doctor"
EXAMPLES = ("hf-compress doctor", "hf-compress doctor --json")

_REQUIRED = (
    "torch",
    "transformers",
    "compressed-tensors",
    "optimum",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "pydantic",
)
# Modules by the extra of hf-compress that installs them.
_OPTIONAL = {
    "eval": ("evaluate", "matplotlib", "sklearn"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "bnb": ("bitsandbytes",),
    "torchao": ("torchao",),
    "lora": ("peft",),
    "gguf": ("gguf",),
    "tensorrt": ("tensorrt",),
    "openvino": ("nncf", "openvino"),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
}
_IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        name: Name of the module.
        extra: The extra of hf-compress that installs it.
        state: `ok`, `absent` or `broken`: installed, and its import fails.
        version: Its version, None where not known.
        reason: What its import raised.
    """

    name: str
    extra: str
    state: Literal["ok", "absent", "broken"]
    version: str | None = None
    reason: str = ""


def command(ctx: typer.Context, as_json: options.AsJson = False, quiet: options.Quiet = False) -> None:
    """Show versions, processor, kernels, optional packages, free memory and disk."""
    import psutil
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..evaluation.environment import environment, package_version

    output = Output.of(ctx, as_json, quiet)
    machine = environment()
    cache = Path(HF_HUB_CACHE)
    with output.status("Probing"):
        installed = {name: package_version(name) for name in _REQUIRED}
        versions = {"hf-compress": _version.__version__, **installed}
        kernels = _kernels()
        packages = _packages()
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(_existing(cache)).free
    output.fields({name: version or "not installed" for name, version in versions.items()})
    output.text("")
    output.fields(_facts(machine, memory, disk, cache))
    output.text("", "kernels, fastest first:")
    output.table((name, "ok" if reason is None else f"not used: {reason}") for name, reason in kernels.items())
    output.text("", "optional packages:")
    output.table((package.name, _state(package)) for package in packages)
    result: dict[str, Any] = {
        "versions": versions,
        "environment": machine.model_dump(mode="json"),
        "kernels": kernels,
        "packages": [asdict(package) for package in packages],
        "free_memory_bytes": memory,
        "free_disk_bytes": disk,
        "cache": str(cache),
    }
    output.result(result)


def _facts(machine: Environment, memory: int, disk: int, cache: Path) -> dict[str, str]:
    """The machine, by name."""
    return {
        "python": machine.python,
        "system": machine.os,
        "processor": f"{machine.processor}, {machine.logical_cpus} logical processors",
        "instructions": " ".join(machine.isa) or "unknown",
        "torch": f"{machine.torch_cpu_capability}, {machine.torch_threads} threads",
        "gpus": ", ".join(machine.gpus) or "none",
        "free memory": size(memory),
        "free disk": size(disk),
        "cache": str(cache),
    }


def _kernels() -> dict[str, str | None]:
    """Why each kernel is not used here, or None if it is."""
    from ..modules.kernels.choose import KERNELS, REFERENCE

    return {**{kernel.name: kernel.probe() for kernel in KERNELS}, REFERENCE: None}


def _packages() -> list[Package]:
    """The state of all optional packages."""
    extras = {name: extra for extra, modules in _OPTIONAL.items() for name in modules}
    distributions = importlib.metadata.packages_distributions()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda name: _package(name, extras[name], distributions.get(name, [])), extras))


def _package(name: str, extra: str, distributions: list[str]) -> Package:
    """The state of one optional package."""
    if importlib.util.find_spec(name) is None:
        return Package(name, extra, "absent")
    version = importlib.metadata.version(distributions[0]) if distributions else None
    reason = _import_problem(name)
    return Package(name, extra, "ok" if reason is None else "broken", version, reason or "")


def _import_problem(name: str) -> str | None:
    """Why a module can't be imported, or None; in a process of its own, which it may take down."""
    command = [sys.executable, "-P", "-c", f"import {name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if done.returncode > 0 and lines else f"its import ended with status {done.returncode}"


def _state(package: Package) -> str:
    """The state of a package in words."""
    if package.state == "absent":
        return f'absent: pip install "hf-compress[{package.extra}]"'
    return f"broken: {package.reason}" if package.state == "broken" else package.version or "ok"


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(found for found in (path, *path.parents) if found.exists())
