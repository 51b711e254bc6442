"""`hfc.compress` from disk to disk: memory of its own, by depth and for a 7B model, against what preflight said."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from benchmarks.memory import anonymous_bytes
from hf_compress.core.registry import METHODS

NAME = "streaming"
GIB = 2**30
LAYERS = 8
"""L of the small Llamas."""
ROWS, TOKENS = 16, 256
"""Calibration data of the 7B-shaped blocks: random token ids."""
INTERVAL_S = 0.05
POOL = 1 << 25
"""Random values that all weights are cut from: drawing 7 billion takes longer than quantizing them."""

DEPTH_RTN = Bar(name="RTN: peak growth, L against 2 L layers", at="most", limit=5.0, unit="%")
DEPTH_GPTQ = Bar(name="GPTQ: peak growth, L against 2 L layers", at="most", limit=5.0, unit="%")
RTN_7B = Bar(name="RTN 4-bit of a 7B Llama: anonymous memory of all processes", at="most", limit=4.0, unit="GiB")
GPTQ_7B = Bar(name="GPTQ of two 7B blocks: anonymous memory of all processes", at="most", limit=8.0, unit="GiB")
SAID_RTN = Bar(name="RTN of a 7B Llama: preflight against measured growth", at="most", limit=25.0, unit="%")
SAID_GPTQ = Bar(name="GPTQ of two 7B blocks: preflight against measured growth", at="most", limit=25.0, unit="%")
BARS = (DEPTH_RTN, DEPTH_GPTQ, RTN_7B, GPTQ_7B, SAID_RTN, SAID_GPTQ)


def llama(folder: Path, layers: int, size: int, inner: int, vocabulary: int) -> Path:
    """A bf16 Llama with random weights, written one layer at a time.

    Args:
        folder: Where it goes.
        layers: Number of blocks.
        size: Hidden size; heads have 128 values.
        inner: Size inside the MLP.
        vocabulary: Rows of the embedding table and of the head, which are not tied.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=size // 128,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).mul_(0.02).bfloat16()
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    places: dict[str, str] = {}
    for number, names in enumerate(files.values()):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file({name: _cut(pool, shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _cut(pool: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values from the pool, from a random place on and around its end; norms are near one."""
    start = int(torch.randint(0, len(pool), (1,), generator=generator))
    copies = -(-(start + shape.numel()) // len(pool))
    values = pool.repeat(copies)[start : start + shape.numel()].view(shape).clone()
    return 1 + values if len(shape) == 1 else values


def request(method: str) -> hfc.QuantConfig:
    """4 bits in groups of 64; with random token ids where data is needed."""
    spec = METHODS.get(method)
    options: dict[str, Any] = {"bits": 4, "group_size": 64}
    if spec.needs_data:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 1000, (ROWS, TOKENS), generator=generator)
        options["calibration"] = [{"input_ids": part} for part in ids.split(8)]
    return spec.config(**options)


def compress_once(path: Path, method: str) -> dict[str, Any]:
    """Compress in a fresh process, its memory read from outside.

    Returns:
        `baseline`: anonymous bytes after the imports; `main` and `all`: the most of that process, and of it together
        with the clean process of the proof, later on; `seconds`; `level` of the proof.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, __file__, "--child", str(path), f"{folder}/out", method]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            if child.stdin is None or child.stdout is None:
                raise RuntimeError("the child has no pipes")
            _line(child.stdout)
            found = {"baseline": anonymous_bytes(child.pid), "main": 0, "all": 0}
            print("go", file=child.stdin, flush=True)
            while not select.select([child.stdout], [], [], INTERVAL_S)[0]:
                own = anonymous_bytes(child.pid)
                others = sum(_anonymous(other.pid) for other in psutil.Process(child.pid).children(recursive=True))
                found["main"] = max(found["main"], own)
                found["all"] = max(found["all"], own + others)
            told = _line(child.stdout)
    return {**found, **told}


def _anonymous(pid: int) -> int:
    """Anonymous memory of a process that may be gone."""
    try:
        return anonymous_bytes(pid)
    except (OSError, RuntimeError):
        return 0


def _line(stream: IO[str]) -> dict[str, Any]:
    """The child's next message; other lines are progress of libraries."""
    for text in stream:
        if text.startswith("{"):
            message: dict[str, Any] = json.loads(text)
            return message
    raise RuntimeError("the child ended without an answer; its error is above")


def _child(path: str, out: str, method: str) -> None:
    """Import, say so, wait, compress, say how long it took."""
    from transformers.models.llama import modeling_llama  # noqa: F401 - belongs to the imports
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = request(method)
    hfc.plan(path, config)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    proof = hfc.compress(path, config, out, memory_limit=0)
    print(json.dumps({"seconds": time.perf_counter() - started, "level": proof.level}), flush=True)


def growth(one: dict[str, Any]) -> float:
    """Bytes that the compressing process took beyond its imports."""
    return float(one["main"] - one["baseline"])


def depth(folder: Path, method: str, smoke: bool) -> tuple[float, dict[str, JsonValue]]:
    """Peak growth with L and 2 L layers: the difference in percent, and all numbers."""
    found: dict[str, JsonValue] = {}
    peaks = []
    for layers in (LAYERS, 2 * LAYERS):
        size = 512 if smoke else 1024
        path = llama(folder / f"deep-{layers}", layers, size, 4 * size, 1024)
        rounds = [compress_once(path, method) for _ in range(1 if smoke else 3)]
        peaks.append(sorted(growth(one) for one in rounds)[len(rounds) // 2])
        found[str(layers)] = list(rounds)
    return 100 * abs(peaks[1] - peaks[0]) / peaks[0], found


def large(folder: Path, method: str, layers: int, smoke: bool) -> tuple[dict[str, Any], int]:
    """A Llama of the shape of 7B: what was measured, and the growth that preflight said."""
    size, inner = (512, 1376) if smoke else (4096, 11008)
    path = llama(folder / f"large-{layers}", layers, size, inner, 32000)
    said = hfc.preflight(path, request(method)).streamed_bytes
    return compress_once(path, method), said


def measure(smoke: bool) -> Measured:
    """Depth, then the large ones; one large checkpoint exists at a time."""
    values: dict[str, float] = {}
    numbers: dict[str, JsonValue] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method, bar in (("rtn", DEPTH_RTN), ("gptq", DEPTH_GPTQ)):
            values[bar.name], numbers[f"depth {method}"] = depth(Path(folder), method, smoke)
    for method, layers, most, said in (("rtn", 32, RTN_7B, SAID_RTN), ("gptq", 2, GPTQ_7B, SAID_GPTQ)):
        with tempfile.TemporaryDirectory() as folder:
            found, expected = large(Path(folder), method, 6 if smoke and layers == 32 else layers, smoke)
        values[most.name] = found["all"] / GIB
        values[said.name] = 100 * abs(expected - growth(found)) / growth(found)
        numbers[f"large {method}"] = {**found, "preflight": expected}
    settings = {"bits": 4, "group_size": 64, "calibration": [ROWS, TOKENS], "layers": LAYERS}
    return Measured(settings=settings, measurements=numbers, values=values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        sys.exit(run(NAME, __doc__, BARS, measure))
