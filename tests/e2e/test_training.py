"""Adapters on top of compressed models, and Trainer's gate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_compress as hfc
from tests._utils.tiny import output, tiny_dir, tiny_inputs
from tests.conformance.helpers import hashes, quantized, reference_logits, relative

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.touches_rng,  # adapters and Trainer draw
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]

CONFIGS = {"int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32), "w8a8": hfc.Int8DynamicQuantConfig}


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Eight rows of tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=5e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("config", CONFIGS)
def test_trainer_refuses_a_bare_model_in_its_own_words(config: str, tmp_path: Path) -> None:
    model = quantized("llama", tiny_dir("llama", tmp_path), CONFIGS[config]())
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Tokens())
    loaded = _saved(model, tmp_path)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=loaded, args=arguments(tmp_path / "run"), train_dataset=Tokens())


def _saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "out")
    return hfc.load(folder / "out")


@pytest.mark.parametrize("reload", [False, True])
def test_adapter_trains_and_reloads_onto_stock(reload: bool, tmp_path: Path) -> None:
    """On the model that was compressed, and on its reload; then onto a stock reload of the base."""
    base = quantized("llama", tiny_dir("llama", tmp_path), CONFIGS["int4"]())
    base.save_pretrained(tmp_path / "out")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(hfc.load(tmp_path / "out") if reload else base)
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Tokens())
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(value.abs().sum() > 0 for value in trained)

    trainer.save_model(str(tmp_path / "adapter"))
    assert sorted(hashes(tmp_path / "adapter", "*.safetensors")) == ["adapter_model.safetensors"]
    inputs = tiny_inputs(base)
    with_adapter = output(model.eval(), inputs)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = output(stock, inputs)  # also decompresses: stock PEFT can't wrap what is still packed (facts, P9)
    again = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert relative(output(again, inputs), with_adapter) <= 1e-5
    assert relative(plain, with_adapter) > 1e-3
    onto_ours = peft.PeftModel.from_pretrained(hfc.load(tmp_path / "out"), tmp_path / "adapter").eval()
    assert relative(output(onto_ours, inputs), with_adapter) <= 1e-5

    after = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}
    packed = [name for name in before if name.endswith(("_packed", "_scale"))]
    assert len(packed) == 28
    assert all(torch.equal(before[name], after[name]) for name in packed)


def test_w8a8_base_with_an_adapter_has_finite_loss(tmp_path: Path) -> None:
    """Inputs are rounded in the forward: the adapter's gradients are those of a straight-through estimate or zero."""
    model = adapted(quantized("llama", tiny_dir("llama", tmp_path), CONFIGS["w8a8"]()))
    result = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Tokens()).train()
    assert math.isfinite(result.training_loss)


def test_dequantized_model_trains_with_plain_trainer(tmp_path: Path) -> None:
    model = quantized("llama", tiny_dir("llama", tmp_path), CONFIGS["int4"]()).dequantize()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    result = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Tokens()).train()
    assert math.isfinite(result.training_loss)


def test_trainer_evaluates_a_compressed_model_after_training(tmp_path: Path) -> None:
    """Train dense, compress in place, evaluate through the same Trainer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir("llama", tmp_path))
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    dense = trainer.evaluate()["eval_loss"]
    hfc.quantize(model, hfc.RTNQuantConfig(bits=8, group_size=32))
    packed = trainer.evaluate()["eval_loss"]
    assert packed == pytest.approx(dense, rel=0.02)
    assert reference_logits(model.eval(), tiny_inputs(model)).isfinite().all()
