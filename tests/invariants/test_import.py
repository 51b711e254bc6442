"""Importing the package: cheap, quiet, registers once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress as hfc

REPOSITORY = Path(__file__).parents[2]
BASELINE = "import torch, transformers.modeling_utils, transformers.quantizers"
HEAVY = (
    *("compressed_tensors", "datasets", "evaluate", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow"),
    *("typer", "click", "rich", "jinja2", "yaml", "optimum", "peft", "bitsandbytes", "torchao", "onnx"),
    *("onnxruntime", "gguf", "numba", "IPython", "PIL", "psutil"),
)
ALLOWED = {
    *("hf_compress", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "packaging"),
    *("importlib", "zoneinfo", "email", "decimal", "_decimal", "numbers", "fractions", "colorsys", "ipaddress"),
    *("uuid", "_uuid", "_zoneinfo", "fnmatch", "nturl2path", "pathlib", "_strptime", "calendar", "rlcompleter"),
    "typing_extensions",
}
"""What importing us may add: ourselves, pydantic, and the standard library that pydantic uses."""


def run(script: str) -> dict[str, object]:
    """What a script prints as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return {**made, "said": done.stdout.splitlines()[:-1], "stderr": done.stderr}


def test_import_adds_little_and_registers() -> None:
    found = run(
        f"""
import json, sys
{BASELINE}
before = set(sys.modules)
threads, state = torch.get_num_threads(), torch.random.get_rng_state()
import hf_compress
after = set(sys.modules)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print(json.dumps({{
    "added": sorted(after - before),
    "cuda": torch.cuda.is_initialized(),
    "config": AUTO_QUANTIZATION_CONFIG_MAPPING["hf_compress"].__name__,
    "quantizer": AUTO_QUANTIZER_MAPPING["hf_compress"].__name__,
    "threads": threads == torch.get_num_threads(),
    "rng": bool(torch.equal(state, torch.random.get_rng_state())),
    "lazy": sorted(name for name in after if name.startswith("hf_compress.")),
}}))
"""
    )
    added = found["added"]
    assert isinstance(added, list)
    roots = {str(name).partition(".")[0] for name in added}
    assert roots & set(HEAVY) == set()
    stray = {root for root in roots - ALLOWED if root not in sys.stdlib_module_names}
    assert stray == set()
    assert not [name for name in added if str(name).startswith(("accelerate", "torch.distributed.", "transformers."))]
    assert (found["config"], found["quantizer"]) == ("QuantConfig", "HFCompressQuantizer")
    assert found["cuda"] is False
    assert found["threads"]
    assert found["rng"]
    assert found["said"] == []
    lazy = found["lazy"]
    assert isinstance(lazy, list)
    assert not [name for name in lazy if name.split(".")[1] in ("cli", "pipeline", "evaluation", "checkpoint")]


def test_registration_happens_once_however_often_we_are_imported() -> None:
    """Reloads, as in notebooks, and a second copy of the package find the name taken and leave it."""
    found = run(
        """
import importlib, json, sys
import hf_compress
from hf_compress.integrations import transformers as ours
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
first = (AUTO_QUANTIZATION_CONFIG_MAPPING["hf_compress"], AUTO_QUANTIZER_MAPPING["hf_compress"])
sizes = (len(AUTO_QUANTIZATION_CONFIG_MAPPING), len(AUTO_QUANTIZER_MAPPING))
importlib.reload(hf_compress)
importlib.reload(ours)
ours.register()
importlib.reload(hf_compress)
for name in [name for name in sys.modules if name.partition(".")[0] == "hf_compress"]:
    del sys.modules[name]
import hf_compress as again
again.RTNQuantConfig(bits=4)
last = (AUTO_QUANTIZATION_CONFIG_MAPPING["hf_compress"], AUTO_QUANTIZER_MAPPING["hf_compress"])
print(json.dumps({
    "same": first == last,
    "sizes": sizes == (len(AUTO_QUANTIZATION_CONFIG_MAPPING), len(AUTO_QUANTIZER_MAPPING)),
    "another": again is not hf_compress,
}))
"""
    )
    assert found["same"]
    assert found["sizes"]
    assert found["another"]


def test_import_survives_a_name_that_is_taken() -> None:
    found = run(
        """
import json
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

@register_quantization_config("hf_compress")
class TheirConfig(QuantizationConfigMixin):
    pass

@register_quantizer("hf_compress")
class TheirQuantizer(HfQuantizer):
    pass

import hf_compress
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print(json.dumps({"kept": AUTO_QUANTIZATION_CONFIG_MAPPING["hf_compress"].__name__}))
"""
    )
    assert found["kept"] == "TheirConfig"


def test_every_public_name_exists() -> None:
    assert [name for name in hfc.__all__ if getattr(hfc, name, None) is None] == []
    assert sorted(hfc._WHERE) == sorted(set(hfc.__all__) - {"__version__"})
    assert dir(hfc) == sorted(hfc.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hfc.no_such_name
