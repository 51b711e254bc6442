"""Same request, same bytes; and nobody's random numbers are touched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from tests._utils.tiny import FAMILIES, tiny, tiny_dir
from tests.conformance.helpers import hashes

REPOSITORY = Path(__file__).parents[2]
CONFIGS: dict[str, Callable[[], Any]] = {
    "int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32),
    "w8a8": hfc.Int8DynamicQuantConfig,
    "cast": hfc.CastConfig,
}


@contextmanager
def same_random_states() -> Iterator[None]:
    """Python's, numpy's and torch's global generators are as they were."""

    def states() -> dict[str, str]:
        torchs = bytes(torch.random.get_rng_state().numpy())
        found = {"python": random.getstate(), "numpy": repr(np.random.get_state()), "torch": torchs}
        return {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in found.items()}

    before = states()
    yield
    assert states() == before


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["bert-classifier", "llama", "t5", "gpt2", "qwen3-moe", "whisper"])
def test_random_states_are_untouched(family: str, config: str, worker: CleanWorker, tmp_path: Path) -> None:
    path, out = tiny_dir(family, tmp_path), tmp_path / "out"
    kind = getattr(transformers, FAMILIES[family][0])
    with same_random_states():
        hfc.plan(path, CONFIGS[config]())
    with same_random_states():
        hfc.preflight(path, CONFIGS[config]())
    with same_random_states():
        hfc.quantize(tiny(family), CONFIGS[config]())
    with same_random_states():
        model = kind.from_pretrained(path, quantization_config=CONFIGS[config]())
    with same_random_states():
        hfc.save(model, out, worker=worker)
    with same_random_states():
        hfc.load(out)
    with same_random_states():
        hfc.verify(out, worker=worker)
    with same_random_states():
        hfc.inspect(out)


def test_random_states_are_untouched_by_evaluation(tmp_path: Path) -> None:
    model = hfc.quantize(tiny("bert-classifier"), hfc.RTNQuantConfig(bits=4, group_size=32))
    ticks = iter(range(10**9))
    with same_random_states():
        hfc.evaluate(model, tiny("bert-classifier"), pairs=8, clock=lambda: float(next(ticks)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saving_again_and_again_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    """Twelve times, since a header of two entries in random order repeats by chance."""
    model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(bits=4, group_size=32))
    made = []
    for index in range(12):
        model.save_pretrained(tmp_path / str(index))
        made.append(hashes(tmp_path / str(index)))
    assert all(one == made[0] for one in made)


SCRIPT = """
import json, sys
import torch
import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
source, target = sys.argv[1:]
with CleanWorker() as worker:
    for name, config in {
        "int4": hfc.RTNQuantConfig(bits=4, group_size=32),
        "w8a8": hfc.Int8DynamicQuantConfig(),
        "cast": hfc.CastConfig(),
    }.items():
        hfc.save(hfc.quantize(source, config), f"{target}/{name}", worker=worker)
print(json.dumps("done"))
"""


def test_two_runs_write_identical_directories(tmp_path: Path) -> None:
    """In two processes with other hash seeds: every file, the record with its proof included."""
    source = tiny_dir("llama", tmp_path)
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / seed)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == "done"
    first, second = hashes(tmp_path / "1"), hashes(tmp_path / "2")
    assert len(first) >= 9
    assert first == second
