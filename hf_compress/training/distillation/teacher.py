"""A teacher: checked against the student before the first step, run without gradients, never a part of the student."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.state import AcceleratorState
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...core.errors import LossError, TeacherError, listed
from ..callback import bare
from .tasks import IGNORED, Outputs, without_adapters

logger = logging.getLogger(__name__)

_ASK_FOR_LOSS = ("labels", "shift_labels", "start_positions", "end_positions", "num_items_in_batch")
"""Arguments that tell a model to compute a loss."""


@runtime_checkable
class _ShiftsLabels(Protocol):
    """An encoder-decoder that makes what its decoder reads out of labels."""

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor: ...


class Teacher:
    """A model that only gives outputs.

    Args:
        model: The teacher, on any device, of any type, quantized or not. It is put into eval mode, and its parameters
            are told to want no gradients.
        tokenizer: Its tokenizer; None takes the one that lies beside its weights on this machine, if any.

    Raises:
        TeacherError: It is no model, or has no values.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TeacherError(
                f"The teacher is a {type(model).__name__}, not a model.",
                "teacher=AutoModelForSequenceClassification.from_pretrained(...)",
            )
        if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
            raise TeacherError("The teacher is on the meta device, without values.", "load its weights")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer or tokenizer_beside(model)
        self.plain = without_adapters(bare(model))
        self._arguments, self._takes_more = _arguments(type(self.plain).forward)
        self._reach = _reach(self.plain)
        targets = _setting(self.plain, "max_target_positions")
        self._reach_of_decoder = targets if isinstance(targets, int) else self._reach

        self._precision: torch.dtype | None = None

    def place(self, device: torch.device) -> None:
        """Make it a part of the run of a Trainer, which exists.

        It computes under the run's mixed precision, as accelerate lets the student do; the object isn't changed for
        it.

        Args:
            device: The student's. The teacher is moved there, if it is not spread over devices of its own.
        """
        types = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self._precision = types.get(str(AcceleratorState().mixed_precision))
        if "hf_device_map" not in vars(self.model):
            self.model.to(device)

    def __call__(self, batch: Mapping[str, Any], student: nn.Module) -> Outputs:
        """Its outputs for a batch of the student.

        Args:
            batch: Forward arguments of the student, without labels.
            student: The student, without wrappers.

        Raises:
            TeacherError: The rows are longer than it can read, or it returns no named outputs.
        """
        self._check_length(batch)
        known, _ = _arguments(type(student).forward)
        given = {name: value for name, value in batch.items() if self._takes(name, known)}
        if "use_cache" in self._arguments:
            given["use_cache"] = False
        if self.model.training:
            self.model.eval()
        with torch.no_grad(), self._autocast(next(student.parameters()).device.type):
            made = self.model(**given)
        if not isinstance(made, Mapping):
            raise TeacherError(f"The teacher returns a {type(made).__name__}.", "teacher.config.return_dict = True")
        return made

    def _autocast(self, device: str) -> AbstractContextManager[None]:
        """The mixed precision of the run."""
        context: AbstractContextManager[None] = (
            nullcontext() if self._precision is None else torch.autocast(device, dtype=self._precision)
        )
        return context

    def alone_takes(self, student: nn.Module) -> frozenset[str]:
        """Names of the arguments that it takes and a student doesn't, such as token types.

        Args:
            student: The student, without wrappers.
        """
        known, _ = _arguments(type(student).forward)
        return self._arguments - known - frozenset(_ASK_FOR_LOSS)

    def _takes(self, name: str, known: Collection[str]) -> bool:
        """Whether it takes an argument: by name or, as the student does, among its further ones."""
        return name in self._arguments or (self._takes_more and name not in known)

    def _check_length(self, batch: Mapping[str, Any]) -> None:
        """Refuse rows that are longer than its positions reach."""
        for name, reach in (("input_ids", self._reach), ("decoder_input_ids", self._reach_of_decoder)):
            ids = batch.get(name)
            if isinstance(ids, Tensor) and reach is not None and ids.shape[-1] > reach > 0:
                raise TeacherError(
                    f"Rows of {ids.shape[-1]} tokens in {name}, but the teacher reads at most {reach}.",
                    f"cut them: tokenizer(..., truncation=True, max_length={reach})",
                )


def without_labels(student: nn.Module, batch: Mapping[str, Any], names: Collection[str] = ()) -> dict[str, Any]:
    """Forward arguments that ask for outputs, not for a loss.

    Args:
        student: The student, without wrappers; it makes what a decoder reads out of the labels.
        batch: Forward arguments with labels.
        names: Further names of labels.
    """
    made = {name: value for name, value in batch.items() if name not in _ASK_FOR_LOSS and name not in names}
    labels = batch.get("labels")
    paired = isinstance(student, PreTrainedModel) and student.config.is_encoder_decoder
    if paired and isinstance(labels, Tensor) and not {"decoder_input_ids", "decoder_inputs_embeds"} & made.keys():
        made["decoder_input_ids"] = _shifted(student, labels)
    return made


def _shifted(student: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads: labels moved by one, as the student itself does it."""
    if isinstance(student, _ShiftsLabels):
        return student.prepare_decoder_input_ids_from_labels(labels=labels)
    start, pad = _setting(student, "decoder_start_token_id"), _setting(student, "pad_token_id")
    moved = torch.cat((labels.new_full((len(labels), 1), start), labels[:, :-1]), dim=1)
    return moved.masked_fill(moved == IGNORED, pad)


def check_finite(outputs: Outputs) -> None:
    """Blame the teacher for a loss that is not finite, if it is its fault.

    Raises:
        LossError: An output holds NaN or infinity; minus infinity is what masks a logit.
    """
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and bool((value.isnan() | value.isposinf()).any()):
            raise LossError(
                f"The teacher's {name} hold NaN or infinity. The student has the weights of its last step.",
                "load the teacher in another type: dtype=torch.float32",
            )


def check_pair(student: nn.Module, teacher: Teacher, tokenizer: Any = None, outputs: bool = True) -> int | None:
    """Check that a student can learn from a teacher.

    Args:
        student: The student.
        teacher: The teacher.
        tokenizer: What the Trainer processes rows with, or None.
        outputs: Whether outputs are compared, so that labels and blanks are to be the same.

    Returns:
        How many entries of the vocabulary both have, where one's is padded to another size; None where the sizes are
        the same, or there is none.

    Raises:
        TeacherError: They share weights, or don't have the same vocabulary, labels or blank.
    """
    own = without_adapters(bare(student))
    _check_apart(own, teacher.plain)
    if outputs:
        _check_labels(own, teacher.plain)
    if outputs and "CTC" in type(own).__name__:
        _check_blank(own, teacher.plain)
    reach = _reach(own), _reach(teacher.plain)
    if reach[0] is not None and reach[1] is not None and reach[1] < reach[0]:
        logger.warning(
            "The teacher reads at most %d tokens, the student %d; longer rows are refused.", *reversed(reach)
        )
    return _common_vocabulary(own, teacher, _as_tokenizer(tokenizer) or tokenizer_beside(own))


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is the student, or would change with it."""
    if student is teacher:
        raise TeacherError("The teacher is the student itself.", "teacher=copy.deepcopy(model)")
    memory = {value.untyped_storage().data_ptr(): name for name, value in student.named_parameters() if value.numel()}
    for name, value in teacher.named_parameters():
        shared = memory.get(value.untyped_storage().data_ptr()) if value.numel() and not value.is_meta else None
        if shared is not None:
            raise TeacherError(
                f"The teacher's {name} is the student's {shared}, in the same memory, so the teacher would learn too.",
                "teacher=copy.deepcopy(model)",
            )


def _check_labels(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse classes of another number or under other indices."""
    if "Classification" not in type(student).__name__:
        return
    own, other = _labels(student), _labels(teacher)
    if own is None or other is None:
        return
    named = not any(label.startswith("LABEL_") for label in (*own, *other))
    if len(own) == len(other) and (not named or own == other):
        return
    raise TeacherError(
        f"The outputs are compared label by label, but the student's are {listed(own)}, the teacher's "
        f"{listed(other)}.",
        "from_pretrained(student, id2label=teacher.config.id2label, label2id=teacher.config.label2id), and encode the "
        "data so",
    )


def _labels(model: nn.Module) -> list[str] | None:
    """Names of a model's classes in the order of its outputs, whatever the order of their listing."""
    found = _setting(model, "id2label")
    return [str(found[index]) for index in sorted(found, key=int)] if isinstance(found, dict) else None


def _check_blank(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse CTC models with other blanks."""
    own, other = _setting(student, "pad_token_id"), _setting(teacher, "pad_token_id")
    if own != other:
        raise TeacherError(f"The student's blank is {own}, the teacher's {other}.", "use the teacher's tokenizer")


def _common_vocabulary(student: nn.Module, teacher: Teacher, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The entries that both vocabularies have, where their sizes differ.

    Raises:
        TeacherError: They are different ones, or can't be compared.
    """
    sizes = _setting(student, "vocab_size"), _setting(teacher.plain, "vocab_size")
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        return None
    own = tokenizer.get_vocab() if tokenizer is not None else None
    other = teacher.tokenizer.get_vocab() if teacher.tokenizer is not None else None
    if own is not None and other is not None:
        foreign = sorted((token for token, index in own.items() if other.get(token) != index), key=own.__getitem__)
        if foreign:
            raise TeacherError(
                f"{len(foreign)} of {len(own)} tokens of the student have another number in the teacher's vocabulary, "
                f"or none: {listed(map(repr, foreign))}.",
                "take a teacher and a student with the same tokenizer",
            )
    if sizes[0] == sizes[1]:
        return None
    known = own or other
    last = max(known.values()) if known else min(sizes)
    if last >= min(sizes):
        raise TeacherError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}, and no tokenizer is known "
            "that tells which of them are padding."
            if not known
            else f"The tokenizer has {last + 1} tokens, but the smaller of both vocabularies {min(sizes)}.",
            "pass processing_class=tokenizer to the Trainer, or take models with the same tokenizer",
        )
    logger.info("Vocabularies of %d and %d entries: the loss is over the %d that are tokens.", *sizes, last + 1)
    return last + 1


def _as_tokenizer(given: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer among what a Trainer processes rows with."""
    if isinstance(given, ProcessorMixin):
        given = vars(given).get("tokenizer")
    return given if isinstance(given, PreTrainedTokenizerBase) else None


def tokenizer_beside(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the directory that a model was loaded from, or in the cache; nothing is downloaded."""
    plain = without_adapters(bare(model))
    name = str(plain.name_or_path) if isinstance(plain, PreTrainedModel) else ""
    if not name:
        return None
    try:
        found = Path(name, _TOKENIZER) if Path(name).is_dir() else try_to_load_from_cache(name, _TOKENIZER)
        if not isinstance(found, str | Path) or not Path(found).is_file():
            return None
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(Path(found).parent)
    except (OSError, ValueError, HFValidationError) as error:
        logger.info(
            "The tokenizer of %s can't be read, so only the sizes of vocabularies are compared: %s", name, error
        )
        return None
    return made


_TOKENIZER = "tokenizer_config.json"


def _setting(model: nn.Module, name: str) -> Any:
    """A value of a model's configuration, of its text part where it has one; None without it.

    The configuration may keep it under a name of its own, such as GPT-2's `n_positions` for `max_position_embeddings`.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    for config in (model.config, model.config.get_text_config()):
        found = config.to_dict().get(config.attribute_map.get(name, name))
        if found is not None:
            return found
    return None


def _reach(model: nn.Module) -> int | None:
    """How many tokens a model's positions reach; None where nothing tells.

    Where the table of positions has a padding index, as in RoBERTa, positions are counted from the one after it.
    """
    positions = _setting(model, "max_position_embeddings")
    if not isinstance(positions, int):
        return None
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding = module.padding_idx
            if padding is not None and module.num_embeddings == positions:
                return positions - padding - 1
    return positions


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Names of the arguments of a class's forward, and whether it takes further ones."""
    parameters = inspect.signature(forward).parameters.values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return frozenset(named), any(one.kind is one.VAR_KEYWORD for one in parameters)
