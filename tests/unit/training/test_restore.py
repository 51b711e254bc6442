"""Weights that transformers stores under other names than the model's, which the Trainer does not read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

import hf_compress as hfc
from hf_compress.core.errors import ResumeError
from hf_compress.training.restore import restore
from tests._utils.tiny import tiny

from .qat.runs import MIDDLE, same, state, trainer_of

pytestmark = pytest.mark.touches_rng  # Trainer seeds

CONFIG = hfc.PruningConfig(sparsity=0.5, start=0.0, end=2, every=1)


def _images(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(index % 2)}
        for index in range(count)
    ]


def _trainer(name: str, folder: Path, **options: Any) -> Trainer:
    made = trainer_of(tiny(name), name, folder, [hfc.PruningCallback(CONFIG)], **options)
    if name == "vit":
        made.train_dataset, made.eval_dataset = _images(), _images(4)
    return made


@pytest.mark.parametrize("name", ["vit", "qwen3-moe"])
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    whole = _trainer(name, tmp_path)
    whole.train()
    stored = load_file(tmp_path / f"checkpoint-{MIDDLE}" / "model.safetensors")
    assert set(whole.model.state_dict()) - set(stored), "the model's own names are stored: nothing is tested"
    again = _trainer(name, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{MIDDLE}"))
    assert same(state(again.model), state(whole.model))


@pytest.mark.parametrize("name", ["vit", "qwen3-moe"])
def test_best_model_is_whole(name: str, tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": MIDDLE, "learning_rate": 0.1}
    trainer = _trainer(name, tmp_path, metric_for_best_model="loss", greater_is_better=True, **options)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert same(state(trainer.model), state(type(tiny(name)).from_pretrained(best)))


def test_what_transformers_computes_is_not_missed(tmp_path: Path) -> None:
    config = transformers.MarianConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) - set(load_file(tmp_path / "model.safetensors")) - set(model.all_tied_weights_keys)
    before = state(model)
    restore(tmp_path, model)
    assert same(state(model), before)


def test_values_that_are_nowhere(tmp_path: Path) -> None:
    model = tiny("vit")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop(next(name for name in stored if "layer" in name))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="no values for"):
        restore(tmp_path, model)
    plain = nn.Linear(2, 2)
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ResumeError, match="bias"):
        restore(tmp_path, plain)
