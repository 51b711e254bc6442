"""The description of the machine, from recorded /proc/cpuinfo texts and from this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import pytest
import torch

from hf_compress.evaluation.environment import (
    Environment,
    environment,
    isa_flags,
    package_version,
    processor_name,
)

X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse4_2 avx f16c avx2 avx512f avx512_bf16 amx_int8 amx_tile avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd aes asimddp i8mm bf16
CPU implementer\t: 0x41
"""


def test_x86() -> None:
    assert processor_name(X86) == "Intel(R) Xeon(R) Platinum 8488C"
    assert isa_flags(X86, "x86_64") == (
        "avx",
        "avx2",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
        "amx_int8",
    )


def test_arm() -> None:
    assert processor_name(ARM) is None
    assert isa_flags(ARM, "aarch64") == ("neon", "asimddp", "i8mm", "bf16")


def test_without_cpuinfo() -> None:
    assert processor_name("") is None
    assert isa_flags("", "arm64") == ("neon",)
    assert isa_flags("", "AMD64") == ()


def test_this_machine() -> None:
    here = environment()
    assert here.processor
    assert here.torch_threads == torch.get_num_threads()
    assert here.python == platform.python_version()
    known = {"torch", "transformers", "compressed-tensors", "bitsandbytes", "torchao", "hf_compress"}
    assert set(here.packages) == known
    assert here.packages["torch"] == importlib.metadata.version("torch")
    assert Environment.model_validate_json(here.model_dump_json()) == here
    with pytest.raises(ValueError, match="frozen"):
        here.python = "2.7"  # type: ignore[misc]


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_memory_and_load_are_the_kernels() -> None:
    with Path("/proc/meminfo").open() as file:
        kibibytes = int(file.readline().split()[1])
    here = environment()
    assert here.memory_bytes == kibibytes * 1024
    assert here.load_average_before is not None
    assert min(here.load_average_before) >= 0


def test_a_package_that_is_missing() -> None:
    assert package_version("no-such-package-of-ours") is None


def test_cuda_stays_uninitialised() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("another test initialised CUDA")
    environment()
    assert not torch.cuda.is_initialized()
