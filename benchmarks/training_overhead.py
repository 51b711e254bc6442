"""What a training step costs with compression, beside a plain one: all Trainers in one process, a step each in turn.

Each Trainer runs its own loop in a thread of its own; a callback hands the turn on, so that exactly one of them works
at any time and all of them meet the same moments of the machine.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_compress as hfc
from benchmarks.training_cells import HIDDEN, Cell
from examples.reference import sentiment
from examples.reference.smollm2 import off_grid_smollm2

PLAIN, TEACHER, DISTILLATION, PRUNING = "plain", "teacher forward", "distillation", "pruning"
DEEP = "distillation, hidden states"
"""As the classifier's recipes have it; the bar is of the loss on the logits alone."""
QAT_WEIGHTS, QAT_STATIC, MOVEMENT = "qat W4 g64", "qat W8A8 static", "movement"
WARMUP = 2
EVERY = 10
"""Most steps from one mask to the next, the default; rounds are a multiple, so a mask counts with its share."""
SHAPES: Mapping[str, tuple[int, int, int]] = {"classifier": (32, 32, 20), "lm": (4, 256, 5)}
"""Rows, tokens and timed rounds."""

Members = Mapping[str, Callable[["Turns", int], list[float]]]


class Turns:
    """Lets threads work one at a time, in a fixed order."""

    def __init__(self, members: int) -> None:
        self._order = deque(range(members))
        self._changed = threading.Condition()

    def take(self, member: int) -> None:
        """Wait until it is this member's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == member)

    def give(self, member: int) -> None:
        """Hand the turn on, and wait for the next one."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()
        self.take(member)

    def leave(self, member: int) -> None:
        """Take no more turns."""
        with self._changed:
            self._order.remove(member)
            self._changed.notify_all()


class Begin(TrainerCallback):
    """First of a Trainer's callbacks: waits for its turn, then starts the clock."""

    def __init__(self, turns: Turns, member: int) -> None:
        self.turns, self.member, self.started = turns, member, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before an optimizer step; its batch is there."""
        self.turns.give(self.member)
        self.started = time.perf_counter()


class End(TrainerCallback):
    """Last of a Trainer's callbacks: stops the clock."""

    def __init__(self, begin: Begin) -> None:
        self.begin, self.seconds = begin, list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After an optimizer step."""
        self.seconds.append(time.perf_counter() - self.begin.started)


def overhead(shape: str, smoke: bool) -> Cell:
    """Seconds of each kind of step, and what they are over a plain one.

    Args:
        shape: A key of `SHAPES`.
        smoke: Few rounds and rows.
    """
    rows, tokens, rounds = (2, 8, 4) if smoke else SHAPES[shape]
    model = _model(shape)
    seconds = _timed(_members(shape, model, _batches(model, rows, tokens, rounds), rows, rounds))
    timed = {name: values[WARMUP:] for name, values in seconds.items()}
    over = {
        name: [one / plain for one, plain in zip(values, timed[PLAIN], strict=True)] for name, values in timed.items()
    }
    taught = [plain + forward for plain, forward in zip(timed[PLAIN], timed[TEACHER], strict=True)]
    for name in timed.keys() & {DISTILLATION, DEEP}:
        over[name] = [one / both for one, both in zip(timed[name], taught, strict=True)]
    means = {name: sum(timed[name]) / sum(timed[PLAIN]) for name in timed if name in (PRUNING, MOVEMENT)}
    return {
        "shape": [rows, tokens],
        "seconds": timed,
        "ratios": {name: _spread(values) for name, values in over.items() if name != PLAIN},
        "mean_ratios": means,
        "masks_every": min(EVERY, rounds),
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low_quartile": low, "high_quartile": high}


def _model(shape: str) -> PreTrainedModel:
    if shape == "lm":
        return AutoModelForCausalLM.from_pretrained(off_grid_smollm2())
    return AutoModelForSequenceClassification.from_pretrained(sentiment.classifier())


def _batches(model: PreTrainedModel, rows: int, tokens: int, rounds: int) -> list[dict[str, Tensor]]:
    """Random rows, all of the same length and without padding."""
    made = torch.Generator().manual_seed(0)
    count = rows * (WARMUP + rounds)
    ids = torch.randint(1000, model.config.vocab_size, (count, tokens), generator=made)
    labels = ids if model.can_generate() else torch.randint(0, model.config.num_labels, (count,), generator=made)
    mask = torch.ones(tokens, dtype=torch.long)
    return [
        {"input_ids": one, "attention_mask": mask, "labels": label} for one, label in zip(ids, labels, strict=True)
    ]


def _members(
    shape: str, model: PreTrainedModel, data: list[dict[str, Tensor]], rows: int, rounds: int
) -> dict[str, Callable[[Turns, int], list[float]]]:
    """Who takes turns."""
    masks = {"sparsity": 0.5, "start": 0.0, "end": 1.0, "every": min(EVERY, rounds)}
    callbacks: dict[str, list[Any]] = {
        PLAIN: [],
        QAT_WEIGHTS: [_qat(bits=4, group_size=64)],
        PRUNING: [hfc.PruningCallback(hfc.PruningConfig(method="magnitude", **masks))],
        DISTILLATION: [],
    }
    if shape == "classifier":
        static = {"activation_bits": 8, "activation_strategy": "tensor"}
        callbacks[QAT_STATIC] = [_qat(bits=8, group_size="channel", **static)]
        callbacks[DEEP] = []
        callbacks[MOVEMENT] = [hfc.PruningCallback(hfc.PruningConfig(method="movement", **masks))]
    taught = {
        DISTILLATION: hfc.DistillationConfig(alpha=0.5, temperature=2.0),
        DEEP: hfc.DistillationConfig(alpha=0.5, temperature=2.0, hidden=HIDDEN),
    }
    members: dict[str, Callable[[Turns, int], list[float]]] = {
        name: partial(_steps, deepcopy(model), model, taught.get(name), made, data, rows, rounds)
        for name, made in callbacks.items()
    }
    batch = {key: torch.stack([row[key] for row in data[:rows]]) for key in ("input_ids", "attention_mask")}
    members[TEACHER] = partial(_forwards, model, batch, rounds)
    return members


def _qat(**fields: Any) -> Any:
    """Ranges are observed in every step, and nothing is converted at the end."""
    return hfc.QATCallback(hfc.QATConfig(freeze=1.0, **fields), convert=False)


def _timed(members: Members) -> dict[str, list[float]]:
    """Seconds of every turn of every member."""
    turns, threads = Turns(len(members)), torch.get_num_threads()

    def work(member: int, take: Callable[[Turns, int], list[float]]) -> list[float]:
        torch.set_num_threads(threads)  # a setting of each thread
        turns.take(member)
        try:
            return take(turns, member)
        finally:
            turns.leave(member)

    with ThreadPoolExecutor(len(members)) as pool:
        running = {name: pool.submit(work, number, take) for number, (name, take) in enumerate(members.items())}
        return {name: one.result() for name, one in running.items()}


def _steps(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    distillation: hfc.DistillationConfig | None,
    callbacks: list[Any],
    data: list[dict[str, Tensor]],
    rows: int,
    rounds: int,
    turns: Turns,
    member: int,
) -> list[float]:
    """A Trainer's steps, with a teacher where there is a distillation."""
    begin = Begin(turns, member)
    end = End(begin)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=WARMUP + rounds,
            per_device_train_batch_size=rows,
            learning_rate=1e-5,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        common = {
            "model": model,
            "args": arguments,
            "train_dataset": data,
            "data_collator": default_data_collator,
            "callbacks": [begin, *callbacks, end],
        }
        if distillation is None:
            trainer = Trainer(**common)
        else:
            trainer = hfc.DistillationTrainer(**common, teacher=teacher, distillation=distillation)
        trainer.train()
    return end.seconds


def _forwards(
    model: PreTrainedModel, batch: Mapping[str, Tensor], rounds: int, turns: Turns, member: int
) -> list[float]:
    """Forward passes of a teacher."""
    seconds = []
    model.eval()
    for _ in range(WARMUP + rounds):
        turns.give(member)
        started = time.perf_counter()
        with torch.no_grad():
            model(**batch)
        seconds.append(time.perf_counter() - started)
    return seconds
