"""Short real trainings of tiny models, which the tests of quantization-aware training share.

As a script, one of them in one of several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from tests._utils.tiny import VOCABULARY, tiny

STEPS = 6
MIDDLE = 3


def rows(family: str, count: int = 16) -> list[dict[str, Tensor]]:
    """Labelled rows for a family, the same every time."""
    generator = torch.Generator().manual_seed(11)
    if family == "resnet":
        images = torch.randn(count, 3, 32, 32, generator=generator)
        return [{"pixel_values": image, "labels": torch.tensor(index % 4)} for index, image in enumerate(images)]
    tokens = torch.randint(5, VOCABULARY, (count, 12), generator=generator)
    if family.startswith("bert"):
        mask = torch.ones(12, dtype=torch.long)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(index % 3)}
            for index, ids in enumerate(tokens)
        ]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def trainer_of(
    model: nn.Module | None, family: str, folder: Path, callbacks: list[TrainerCallback], **options: Any
) -> Trainer:
    """A plain Trainer; the keywords are arguments of `TrainingArguments`, and `model_init`."""
    made = options.pop("model_init", None)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": MIDDLE,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        model_init=made,
        args=TrainingArguments(**{**values, **options}),
        train_dataset=rows(family),
        eval_dataset=rows(family, 4),
        callbacks=callbacks,
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors of a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and bits; NaN equals NaN."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name].nan_to_num(7), right[name].nan_to_num(7))
        for name in left
    )


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint of the Trainer holds."""
    return load_file(checkpoint / "model.safetensors")


def late_scales(folder: Path, batch: int) -> Trainer:
    """Scales that are learned from the middle on, with gradient checkpointing and without dropout."""
    model = tiny("bert-classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = QATConfig(bits=4, group_size=32, learn_scales=True, start=MIDDLE)
    options = {"per_device_train_batch_size": batch, "gradient_checkpointing": True, "save_strategy": "no"}
    return trainer_of(model, "bert", folder, [QATCallback(config, convert=False)], **options)


if __name__ == "__main__":
    trainer = late_scales(Path(sys.argv[1]) / "run", batch=1)
    trainer.train()
    save_file(state(trainer.model), Path(sys.argv[1]) / f"rank-{trainer.args.process_index}.safetensors")
