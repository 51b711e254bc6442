"""Failures of training: refused before the first step, or stopped before one that would spoil the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import hf_compress as hfc
from tests._utils.tiny import tiny

from .error_cases import Act, Arena, Case


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Four rows of tokens, which are their own labels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 128, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(arena: Arena, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
    made = {"max_steps": 2, "per_device_train_batch_size": 2, **quiet, **options}
    return TrainingArguments(output_dir=str(arena.folder / "run"), **made)


def trainer(arena: Arena, model: nn.Module, *callbacks: Any, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """A Trainer; the folder that it makes is there before the failing call."""
    (arena.folder / "run").mkdir(exist_ok=True)
    given = {"model": model, "args": arguments(arena), "train_dataset": Tokens(), "callbacks": list(callbacks)}
    return kind(**{**given, **options})


def qat(**fields: Any) -> Any:
    return hfc.QATCallback(hfc.QATConfig(**{"bits": 4, "group_size": 32, **fields}))


def prune(**fields: Any) -> Any:
    return hfc.PruningCallback(hfc.PruningConfig(**fields))


def option(make: Callable[[], object]) -> Callable[[Arena], Act]:
    """A row's call: building a configuration."""
    return lambda arena: make


def preparing(make: Callable[[], Any], model: Callable[[Arena], Any]) -> Callable[[Arena], Act]:
    """A row's call: preparing a model for a callback."""

    def provoke(arena: Arena) -> Act:
        callback, prepared = make(), model(arena)
        return lambda: callback.prepare(prepared)

    return provoke


def training(*makers: Callable[[], Any], **options: Any) -> Callable[[Arena], Act]:
    """A row's call: training with callbacks."""
    return lambda arena: trainer(arena, tiny("llama"), *(make() for make in makers), **options).train


def late(arena: Arena) -> Act:
    made = trainer(arena, tiny("llama"))
    made.add_callback(qat())
    return made.train


def from_init(arena: Arena) -> Act:
    options = {"model_init": lambda: tiny("llama"), "train_dataset": Tokens()}
    (arena.folder / "run").mkdir()
    return Trainer(args=arguments(arena), callbacks=[prune()], **options).train


def unconfigured(arena: Arena) -> Act:
    model = arena.live()
    return lambda: hfc.QATCallback().prepare(model)


def nan_loss(arena: Arena) -> Act:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")  # a norm, which nothing prunes
    return trainer(arena, model, prune(start=2, end=2)).train


def foreign_checkpoint(arena: Arena) -> Act:
    """A run that was started without the callback."""
    (arena.folder / "run").mkdir()
    plain = Trainer(
        model=tiny("llama"),
        args=arguments(arena, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=Tokens(),
    )
    plain.train()
    made = trainer(arena, tiny("llama"), prune())
    return lambda: made.train(resume_from_checkpoint=str(arena.folder / "run" / "checkpoint-1"))


def teaching(arena: Arena, teacher: Any, model: Any = None, **fields: Any) -> Act:
    """Building a Trainer with a teacher."""
    student = tiny("llama") if model is None else model
    config = hfc.DistillationConfig(**fields)
    return lambda: trainer(arena, student, kind=hfc.DistillationTrainer, teacher=teacher, distillation=config)


def own_teacher(arena: Arena) -> Act:
    (arena.folder / "run").mkdir()
    model = tiny("llama")
    return teaching(arena, model, model)


def other_labels(arena: Arena) -> Act:
    (arena.folder / "run").mkdir()
    return teaching(arena, tiny("bert-classifier", num_labels=2), tiny("bert-classifier", num_labels=3))


def other_vocabulary(arena: Arena) -> Act:
    (arena.folder / "run").mkdir()
    return teaching(arena, tiny("llama", vocab_size=96))


def merging(arena: Arena) -> Act:
    """An adapter that changes less than a step of a 2-bit grid."""
    base = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=2, group_size=32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a deprecated property
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.fill_(1e-4)
    arena.watch(model)
    return lambda: hfc.merge_adapter(model)


def unprepared(arena: Arena) -> Act:
    model = arena.live()
    return lambda: hfc.convert(model)


def unconverted(arena: Arena) -> Act:
    model = tiny("llama")
    qat().prepare(model)
    arena.watch(model)
    return lambda: hfc.save(model, arena.out, worker=arena.worker)


def untrained(entry: str) -> Callable[[Arena], Act]:
    """A row's call: an entry point that trains nothing, with a method that trains."""

    def provoke(arena: Arena) -> Act:
        path, config = arena.dense(), hfc.QATConfig(bits=4)
        rest = (arena.out,) if entry == "compress" else ()
        return lambda: getattr(hfc, entry)(path, config, *rest)

    return provoke


def too_few_blocks(arena: Arena) -> Act:
    model = arena.live()
    return lambda: hfc.student_from_teacher(model, layers=9)


def shared_layers(arena: Arena) -> Act:
    model = arena.live("albert")
    return lambda: hfc.student_from_teacher(model, layers=1)


def case(name: str, code: str, provoke: Callable[[Arena], Act], *words: str) -> Case:
    return Case(name=f"training-{name}", provoke=provoke, code=code, words=words)


CASES = (
    # How a Trainer is set up.
    case("late", "HFC304", late, "QATCallback", "too late", "callbacks=[QATCallback("),
    case("model-init", "HFC304", from_init, "model_init", "prepare(model)"),
    case(
        "qat-nothing", "HFC304", preparing(lambda: hfc.QATCallback(), lambda arena: arena.live()), "no configuration"
    ),
    case("quantized", "HFC405", preparing(prune, lambda arena: arena.packed()), "quantized already"),
    case("qat-twice", "HFC405", preparing(qat, lambda arena: arena.packed()), "quantized already"),
    # Configurations.
    case("sparsity-high", "HFC202", option(lambda: prune(sparsity=1.5)), "sparsity", "1.5"),
    case("sparsity-negative", "HFC202", option(lambda: prune(sparsity=-0.1)), "sparsity", "-0.1"),
    case("pattern", "HFC202", option(lambda: prune(pattern="4:2")), "'4:2'", '"2:4"'),
    case("alpha", "HFC202", option(lambda: hfc.DistillationConfig(alpha=2.0)), "alpha"),
    case("int4-inputs", "HFC202", option(lambda: qat(activation_bits=8)), "activation_bits=8", "bits=4"),
    case("qat-config-type", "HFC202", option(lambda: hfc.QATCallback({"bits": 4})), "is a dict", "QATConfig(bits=4)"),
    case("prune-schedule", "HFC202", training(lambda: prune(start=0, end=9)), "9", "2 optimizer steps"),
    case("qat-schedule", "HFC202", training(lambda: qat(start=9)), "start=9", "2 optimizer steps"),
    case("layers", "HFC202", too_few_blocks, "layers=9", "2 blocks", "layers=1"),
    case("shared-layers", "HFC403", shared_layers, "share weights"),
    # Teachers.
    case("own-teacher", "HFC410", own_teacher, "the student itself", "copy.deepcopy(model)"),
    case("labels", "HFC410", other_labels, "LABEL_2", "id2label"),
    case("vocabulary", "HFC410", other_vocabulary, "96", "128"),
    # In the middle.
    case("nan", "HFC602", nan_loss, "NaN or infinite after 0 optimizer steps", "learning rate"),
    case("resume-foreign", "HFC707", foreign_checkpoint, "hf_compress_state.safetensors", "checkpoint-1"),
    # Afterwards.
    case("merge", "HFC603", merging, "limit=0.5", "int2", 'model.save_pretrained("adapter")'),
    case("unprepared", "HFC403", unprepared, "nothing to convert", "QATCallback"),
    case("unconverted", "HFC403", unconverted, "hf_compress.convert(model)"),
    *(
        case(f"qat-{entry}", "HFC202", untrained(entry), "nothing is trained here", "QATCallback")
        for entry in ("quantize", "compress", "preflight")
    ),
)
