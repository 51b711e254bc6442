"""Where a number was measured: processor, threads, load, memory and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

# What int8, bf16 and packed kernels choose by; Arm's names as /proc/cpuinfo has them, asimd told as neon.
_ISA_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimddp",
    "asimdhp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
_PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "torchao", "hf_compress")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")


class Environment(BaseModel):
    """The machine and software of a measurement; all that is unknown is None or empty.

    Args:
        processor: The processor's name.
        isa: Instruction sets that kernels choose by, as the operating system reports them.
        torch_cpu_capability: The vector width torch's own kernels chose, such as "AVX512".
        logical_cpus: Logical processors of the machine.
        torch_threads: Threads inside one operator.
        torch_interop_threads: Threads across operators.
        load_average_before: Runnable processes over the last 1, 5 and 15 minutes. Ask before measuring.
        memory_bytes: Physical memory in bytes.
        os: Operating system, kernel and architecture.
        python: Python's version.
        packages: Version of each package that matters, None if it is not installed.
        gpus: Names of the GPUs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    isa: tuple[str, ...]
    torch_cpu_capability: str
    logical_cpus: int | None
    torch_threads: int
    torch_interop_threads: int
    load_average_before: tuple[float, float, float] | None
    memory_bytes: int | None
    os: str
    python: str
    packages: dict[str, str | None]
    gpus: tuple[str, ...]


def environment() -> Environment:
    """Describe this machine. Initialises no CUDA and changes nothing."""
    cpuinfo = _CPUINFO.read_text(errors="replace") if _CPUINFO.is_file() else ""
    machine = platform.machine()
    return Environment(
        processor=processor_name(cpuinfo) or platform.processor() or machine,
        isa=isa_flags(cpuinfo, machine),
        torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        logical_cpus=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        torch_interop_threads=torch.get_num_interop_threads(),
        load_average_before=_load_average(),
        memory_bytes=_memory_bytes(),
        os=platform.platform(),
        python=platform.python_version(),
        packages={name: package_version(name) for name in _PACKAGES},
        gpus=_gpus(),
    )


def processor_name(cpuinfo: str) -> str | None:
    """The processor's name in the text of /proc/cpuinfo; Arm kernels often give none."""
    return _field(cpuinfo, "model name") or _field(cpuinfo, "Model")


def isa_flags(cpuinfo: str, machine: str) -> tuple[str, ...]:
    """The instruction sets that matter, in a fixed order.

    Args:
        cpuinfo: Text of /proc/cpuinfo, empty where there is none.
        machine: As of `platform.machine()`. Advanced SIMD is part of every 64-bit Arm machine.
    """
    found = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    if "asimd" in found or machine.lower() in ("arm64", "aarch64"):
        found.add("neon")
    return tuple(flag for flag in _ISA_FLAGS if flag in found)


def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _field(text: str, name: str) -> str | None:
    """The first non-empty `name : value` in the text."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name and value.strip():
            return value.strip()
    return None


def _load_average() -> tuple[float, float, float] | None:
    if sys.platform == "win32":
        return None
    try:
        return os.getloadavg()
    except OSError:
        return None


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> tuple[str, ...]:
    """From CUDA if it runs already, else from the driver's files: asking CUDA would initialise it."""
    if torch.cuda.is_initialized():
        return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if not _NVIDIA_DRIVER.is_dir():
        return ()
    texts = [file.read_text(errors="replace") for file in sorted(_NVIDIA_DRIVER.glob("*/information"))]
    return tuple(name for text in texts if (name := _field(text, "Model")) is not None)
