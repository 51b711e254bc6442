"""GPTQModel in an environment of its own, and the checks that it and this package read each other's checkpoints.

python scripts/gptqmodel_env.py make        # .venv-gptqmodel: takes minutes, and needs a C++ compiler
python scripts/gptqmodel_env.py check       # both directions; prints JSON and fails where logits differ
python scripts/gptqmodel_env.py fixtures    # checkpoints and logits of GPTQModel for tests/_utils/fixtures

`check` and `fixtures` run in this package's environment and start the other one. GPTQModel asks for a newer torch
than this package is tested with, so it is installed without its dependencies, and these one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hf_compress as hfc  # noqa: E402
from tests._utils.tiny import VOCABULARY, output, tiny, tiny_inputs, tiny_tokenizer  # noqa: E402

ENVIRONMENT = ROOT / ".venv-gptqmodel"
FIXTURES = ROOT / "tests" / "_utils" / "fixtures" / "gptqmodel"
WORKER = ROOT / "scripts" / "gptqmodel_worker.py"
PACKAGES = (
    *("transformers==5.23.0", "optimum==2.3.0", "accelerate", "datasets", "numpy", "safetensors", "threadpoolctl"),
    *("packaging", "device-smi", "protobuf", "pillow", "requests", "pypcre", "tokenicer", "logbar", "jinja2", "ninja"),
    *("maturin", "pyarrow", "dill", "torchao==0.18.0", "defuser"),
)
WRITTEN: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32},
    "gptq-act": {"bits": 4, "group_size": 32, "desc_act": True},
    "awq": {"bits": 4, "group_size": 32, "method": "awq", "format": "gemm"},
}
"""What GPTQModel writes for us to read."""

READ: dict[str, dict[str, Any]] = {
    "gptq": {"format": "gptq"},
    "gptq 8 bits": {"format": "gptq", "bits": 8, "group_size": 32},
    "gptq_v2 asymmetric": {"format": "gptq_v2", "symmetric": False, "group_size": 32},
    "awq": {"format": "awq", "group_size": 32},
    "awq asymmetric": {"format": "awq", "symmetric": False, "group_size": 16},
    "awq channel": {"format": "awq", "group_size": "channel", "skip": ["*k_proj"], "min_coverage": 0.5},
}
"""What we write for GPTQModel to read."""

SMALL = {"num_hidden_layers": 1, "num_key_value_heads": 4}
"""One block; GPTQModel's AWQ needs a multiple of 64 outputs."""

LIMIT = 8 * torch.finfo(torch.float16).eps
"""Largest difference of logits, relative to the largest: GPTQModel multiplies codes and scales in float16, rounding
each by half a unit of the last place, and sums in another order."""


def make(folder: Path) -> None:
    """Make the environment."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    for packages in (["torch==2.13.0"], PACKAGES, ["--no-deps", "gptqmodel==7.7.0"]):
        subprocess.run([*pip, *packages], check=True)


def run_jobs(folder: Path, jobs: Sequence[Mapping[str, Any]], work: Path) -> None:
    """Run jobs in the other environment (see `gptqmodel_worker.py`).

    Raises:
        RuntimeError: It failed; with its last lines.
    """
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    python = [str(folder.absolute() / "bin" / "python"), str(WORKER), str(work / "jobs.json")]
    # With fewer than two workers it can't start ("Virtual pool requests 2 workers").
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    # It writes logs/ into the current directory.
    done = subprocess.run(python, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-15:]))


def write_dense(work: Path) -> None:
    """The model that GPTQModel quantizes, and the inputs of all comparisons."""
    model = tiny("llama", dtype=torch.bfloat16, **SMALL)
    model.save_pretrained(work / "dense")
    tiny_tokenizer().save_pretrained(work / "dense")
    save_file({name: value.contiguous() for name, value in tiny_inputs(model).items()}, work / "inputs.safetensors")


def jobs_of_theirs(work: Path) -> list[dict[str, Any]]:
    """Jobs that write GPTQModel's checkpoints, and their logits in float32."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (16, 48), generator=generator).tolist()
    jobs: list[dict[str, Any]] = []
    for name, fields in WRITTEN.items():
        out = str(work / name)
        jobs.append({"op": "write", "model": str(work / "dense"), "out": out, "fields": fields, "rows": rows})
        jobs.append(logits_job(work, name))
    return jobs


def logits_job(work: Path, name: str) -> dict[str, Any]:
    """The job that runs the checkpoint `name`."""
    inputs, out = str(work / "inputs.safetensors"), str(work / f"{name}.safetensors")
    return {"op": "logits", "model": str(work / name), "inputs": inputs, "out": out, "dtype": "float32"}


def in_float32(path: Path) -> Path:
    """A checkpoint whose config asks for float32, in which scales of float16 are exact."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    return path


def relative(expected: torch.Tensor, seen: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((expected - seen).abs().max() / expected.abs().max())


def check(folder: Path) -> dict[str, Any]:
    """Read each other's checkpoints.

    Returns:
        Per checkpoint, ours with `ours` before its name: the relative difference of logits, its limit, GPTQModel's
        kernels that ran in how many layers, names that it missed, and versions.

    Raises:
        RuntimeError: GPTQModel failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_dense(work)
        ours = write_ours(work)
        run_jobs(folder, [*jobs_of_theirs(work), *(logits_job(work, name) for name in ours)], work)
        inputs = load_file(work / "inputs.safetensors")
        theirs = {name: output(hfc.load(in_float32(work / name)), inputs) for name in WRITTEN}
        return {name: compared(work, name, logits) for name, logits in {**theirs, **ours}.items()}


def write_ours(work: Path) -> dict[str, torch.Tensor]:
    """Our checkpoints, unproven; their logits by name."""
    made = {}
    inputs = load_file(work / "inputs.safetensors")
    for name, fields in READ.items():
        model = hfc.quantize(tiny("llama", **SMALL), hfc.RTNQuantConfig(**fields))
        model.save_pretrained(work / f"ours {name}")
        made[f"ours {name}"] = output(model, inputs)
    foreign = FIXTURES / "gptq-act"
    if foreign.is_dir():
        model = hfc.load(in_float32(Path(shutil.copytree(foreign, work / "copy"))))
        model.save_pretrained(work / "ours gptq with g_idx")
        made["ours gptq with g_idx"] = output(model, inputs)
    return made


def compared(work: Path, name: str, ours: torch.Tensor) -> dict[str, Any]:
    """One comparison."""
    told = json.loads((work / f"{name}.safetensors.json").read_text(encoding="utf-8"))
    theirs = load_file(work / f"{name}.safetensors")["logits"]
    return {"relative": relative(ours, theirs), "limit": LIMIT, **told, "packed": len(told["packed"])}


def fixtures(folder: Path) -> None:
    """Write GPTQModel's checkpoints and logits for the tests, without what is not needed to read them."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_dense(work)
        run_jobs(folder, jobs_of_theirs(work), work)
        shutil.rmtree(FIXTURES, ignore_errors=True)
        for name in WRITTEN:
            target = FIXTURES / name
            target.mkdir(parents=True)
            config = json.loads((work / name / "config.json").read_text(encoding="utf-8"))
            meta = config["quantization_config"]["meta"]  # also has paths of this machine
            config["quantization_config"]["meta"] = {"quantizer": meta["quantizer"]}
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copy(work / name / "model.safetensors", target)
            example = {**load_file(work / "inputs.safetensors"), **load_file(work / f"{name}.safetensors")}
            save_file(example, target / "example.safetensors")
            (target / "example.safetensors").chmod((target / "config.json").stat().st_mode)


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "check", "fixtures"))
    parser.add_argument("folder", type=Path, nargs="?", default=ENVIRONMENT)
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder)
        return 0
    if given.command == "fixtures":
        fixtures(given.folder)
        return 0
    results = check(given.folder)
    print(json.dumps(results, indent=2))
    return int(any(one["relative"] > LIMIT or one["missing"] for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
