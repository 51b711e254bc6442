"""A tiny classifier that is pruned, quantized and distilled in one run; as a script, in one of several processes."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress.core.errors import TrainerError
from hf_compress.training.distillation.config import DistillationConfig
from hf_compress.training.distillation.mixin import DistillationTrainer
from hf_compress.training.pruning.callback import PruningCallback
from hf_compress.training.pruning.config import PruningConfig
from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from tests._utils.tiny import VOCABULARY, tiny

SPARSITY = 0.5
INT4: dict[str, Any] = {"bits": 4, "group_size": 32, "learn_scales": True, "start": 1, "freeze": 5}
W8A8: dict[str, Any] = {
    "bits": 8,
    "group_size": "channel",
    "activation_bits": 8,
    "activation_strategy": "tensor",
    "start": 2,
    "freeze": 5,
}


class Rows(Dataset[dict[str, Tensor]]):
    """Thirty-two rows of ten tokens."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(5, VOCABULARY, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 3)}


class Tokens(Rows):
    """The same rows, whose tokens are to be predicted."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "labels": row["input_ids"]}


def student(dropout: float = 0.1) -> PreTrainedModel:
    """The model that is compressed."""
    return tiny("bert-classifier", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def teacher() -> PreTrainedModel:
    """Another model of the same classes."""
    model, generator = tiny("bert-classifier"), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def trainer_of(
    folder: Path,
    quantization: dict[str, Any],
    prune_first: bool = True,
    convert: bool = True,
    dropout: float = 0.1,
    **arguments: Any,
) -> Trainer:
    """Six steps with all three, saved every second one."""
    prune = PruningCallback(PruningConfig(sparsity=SPARSITY, start=1, end=4, every=1))
    quantize = QATCallback(QATConfig(**quantization), convert=convert)
    callbacks: list[TrainerCallback] = [prune, quantize] if prune_first else [quantize, prune]
    given = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, **arguments}
    return DistillationTrainer(
        model=student(dropout),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            **given,
        ),
        train_dataset=Rows(),
        callbacks=callbacks,
        teacher=teacher(),
        distillation=DistillationConfig(alpha=0.5, temperature=2.0),
    )


def in_step(folder: Path, batch: int) -> Trainer:
    """A run whose result does not depend on the number of processes but for the order of sums.

    Without dropout, which differs between processes, and by plain gradient descent: Adam divides gradients by their
    own size, so that of one that is all rounding error would become a step of full length. Half of the steps are
    clipped: the norm is that of all gradients, those of pruned weights left out.
    """
    return trainer_of(
        folder,
        W8A8,
        convert=False,
        dropout=0.0,
        per_device_train_batch_size=batch,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.3,
    )


def moving(folder: Path, batch: int) -> Trainer:
    """A run of movement pruning alone, whose scores learn from the gradients of all processes.

    Of a language model: the classifier's gradients behind its first token are too small for Adam, which divides
    scores' gradients by their size, to tell them from rounding errors.
    """
    config = PruningConfig(method="movement", sparsity=SPARSITY, start=1, end=6, every=1)
    return Trainer(
        model=tiny("llama-tied"),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            save_steps=5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.3,
        ),
        train_dataset=Tokens(),
        callbacks=[PruningCallback(config)],
    )


def main(folder: Path) -> None:
    """Train in one of two processes, and write down what this one sees."""
    trainer = in_step(folder / "run", batch=4)
    trainer.train()
    rank = trainer.args.process_index
    seen: dict[str, Any] = {
        "processes": trainer.args.world_size,
        "saves": trainer.args.should_save,
        "wrapped": sum(isinstance(one, nn.parallel.DistributedDataParallel) for one in gc.get_objects()),
        "student_wrapped": isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    mover = moving(folder / "moving", batch=2)
    mover.train()
    for name, model in (("rank", trainer.model), ("moving", mover.model)):
        kept = {key: value.detach().clone() for key, value in model.state_dict().items()}
        save_file(kept, folder / f"{name}-{rank}.safetensors")
    try:
        trainer_of(folder / "sharded", INT4, fsdp=True)
    except TrainerError as error:
        seen["refusal"] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
