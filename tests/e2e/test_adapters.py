"""Adapters trained on compressed models as QLoRA does, and read back in a process without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_compress as hfc
from tests._utils.tiny import output, tiny, tiny_inputs
from tests.conformance.helpers import hashes, reference_logits, relative

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.touches_rng,  # adapters and Trainer draw
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]

STOCK = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    inputs = load_file(folder / "inputs.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        plain = base(**inputs).logits  # stock decompresses in the first forward, which PEFT needs
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        save_file({"plain": plain, "adapter": model(**inputs).logits}, folder / "stock.safetensors")
if "hf_compress" in sys.modules:
    raise SystemExit("not without hf_compress")
"""


def data() -> hfc.Calibration:
    ids = torch.randint(5, 128, (8, 40), generator=torch.Generator().manual_seed(3))
    return hfc.Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


CONFIGS: dict[str, Callable[[], Any]] = {
    "int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32),
    "gptq": lambda: hfc.GPTQQuantConfig(bits=4, group_size=32, calibration=data()),
    "w8a8-static": lambda: hfc.Int8StaticQuantConfig(calibration=data()),
}


def rows() -> list[dict[str, Tensor]]:
    tokens = torch.randint(5, 128, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def trained(config: Any, folder: Path, checkpointing: bool) -> Any:
    """A PEFT model after four steps of a plain Trainer."""
    base = hfc.quantize(tiny("llama"), config)
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=5e-2,
        activation_checkpointing=checkpointing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows()).train()
    return model.eval()


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def test_gradient_checkpointing_trains_the_same_adapter(tmp_path: Path) -> None:
    """What is computed twice is computed alike: packed weights dequantize to the same bits."""
    kept = adapter_of(trained(CONFIGS["int4"](), tmp_path / "kept", checkpointing=False))
    again = adapter_of(trained(CONFIGS["int4"](), tmp_path / "again", checkpointing=True))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert all(bool(value.any()) for name, value in kept.items() if "lora_B" in name)


def test_adapters_reload_onto_stock_bases_in_a_process_without_us(tmp_path: Path) -> None:
    """Weight-only up to the order of sums; with quantized inputs, a value at the edge between two steps may take the
    other one, 1/127 of a range, and 1e-2 of the logits bounds what few such values do."""
    before: dict[str, Tensor] = {}
    for name, config in CONFIGS.items():
        folder = tmp_path / name
        model = trained(config(), folder, checkpointing=False)
        model.save_pretrained(folder / "adapter")
        assert sorted(hashes(folder / "adapter", "*.safetensors")) == ["adapter_model.safetensors"]
        inputs = tiny_inputs(model.get_base_model())
        save_file(inputs, folder / "inputs.safetensors")
        before[name] = reference_logits(model, inputs)
        loaded = peft.PeftModel.from_pretrained(hfc.load(folder / "base"), folder / "adapter").eval()
        assert torch.equal(output(loaded, inputs), output(model, inputs))
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, *(str(tmp_path / name) for name in CONFIGS)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, expected in before.items():
        stock = load_file(tmp_path / name / "stock.safetensors")
        assert relative(stock["adapter"], expected) <= (1e-2 if name == "w8a8-static" else 1e-5)
        assert relative(stock["plain"], expected) > 5e-2
