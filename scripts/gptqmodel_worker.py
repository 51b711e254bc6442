"""What runs inside GPTQModel's environment (see `gptqmodel_env.py`): writes checkpoints, and computes logits.

Knows nothing of this package. Reads a JSON list of jobs, each `{"op": "write" or "logits", ...arguments}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write(model: str, out: str, fields: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> None:
    """Quantize a dense checkpoint with GPTQModel and save it.

    Args:
        model: Directory of the dense model.
        out: Directory to write.
        fields: Arguments of `QuantizeConfig`.
        rows: Token ids to calibrate with.
    """
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(model, QuantizeConfig(**fields), device="cpu")
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    loaded.save(out)


def logits(model: str, inputs: str, out: str, dtype: str) -> None:
    """Logits of a causal LM that stock transformers loads, with GPTQModel's kernels where it is quantized.

    Args:
        model: Directory of the model.
        inputs: safetensors file of its forward's arguments.
        out: safetensors file to write: `logits`, float32; beside it `.json`: kernels, versions, missing weights.
        dtype: Data type to load it in, or `auto`.
    """
    from transformers import AutoModelForCausalLM

    options = {"device_map": "cpu", "dtype": dtype, "output_loading_info": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(model, **options)
    parts = {name: part for name, part in loaded.named_modules() if type(part).__module__.startswith("gptqmodel")}
    with torch.inference_mode():
        made = loaded.eval()(**load_file(inputs)).logits.float()
    save_file({"logits": made.contiguous()}, out)
    told = {
        "kernels": sorted({type(part).__name__ for part in parts.values()}),
        "packed": sorted(parts),
        "missing": sorted(info["missing_keys"]),
        "versions": {name: version(name) for name in ("torch", "transformers", "gptqmodel")},
    }
    Path(f"{out}.json").write_text(json.dumps(told), encoding="utf-8")


def main(jobs: str) -> int:
    """Run the jobs of a file, in order."""
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        {"write": write, "logits": logits}[job.pop("op")](**job)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
