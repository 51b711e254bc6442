"""Calibration data: from what a user has to batches for the model's forward, and what a checkpoint says of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.config import Calibration
from ..core.errors import CalibrationError
from ..core.plan import CalibrationRecord
from .data_batches import check_batches, completed, ready_batches, token_count
from .data_media import media_rows, stacked, tensor_batches
from .data_model import config_int, is_text_model, reads_tokens
from .data_sources import Items, read_items
from .data_text import TextRows, padded, text_rows, token_rows
from .default_text import NOTE, default_texts
from .distilled import distilled_images, has_batch_norm
from .generated_text import generated_tokens, samples
from .padding import row_count
from .processors import Source, tokenizer_of

logger = logging.getLogger(__name__)

GENERATED = "generated"
"""As data: the model makes its own."""

_WORDS = ("texts", "conversations", "token ids")
"""Kinds of data that only a model that reads tokens takes."""

_GIVE_DATA = "calibration=[...] with texts, images, sound, a datasets.Dataset, a DataLoader, a file, or ready batches"


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration data as the model gets it.

    Attributes:
        batches: Arguments of forward, on the CPU: ids and masks in int64, everything else in the model's data type;
            at most `batch_size` rows each, all of one length.
        record: What a checkpoint says of them.
    """

    batches: tuple[dict[str, Tensor], ...]
    record: CalibrationRecord


@dataclass(frozen=True)
class _Made:
    """Batches, and where they come from."""

    source: str
    batches: list[dict[str, Tensor]]
    packed: bool = False
    text: TextRows | None = None


def prepare(calibration: Calibration | None, model: nn.Module, processor_source: Source = None) -> CalibrationSet:
    """Make batches of calibration data: read, tokenize, draw, pack or pad, check, count and hash.

    Text is padded on the right, and the mask says where. The same data, settings, tokenizer and model give the same
    tensors, so the same hash.

    Args:
        calibration: The data; None takes the text that comes with Python, for language models.
        model: The model; its weights may be on the meta device unless it makes its own data. It is not changed.
        processor_source: Id or directory to read a tokenizer or processor from, before the model's own.

    Raises:
        CalibrationError: The data is missing, empty, too little, of unknown form, or nothing that this model can read.
    """
    request = calibration or Calibration()
    if is_generated(request):
        made = _generated(request, model, processor_source)
    elif request.data is None:
        made = _default(request, model, processor_source)
    else:
        made = _given(request, read_items(request), model, processor_source)
    batches = tuple(completed(batch, model) for batch in made.batches)
    check_batches(list(batches), model)
    record = _recorded(made, batches, request)
    _check_amount(record, made, request)
    return CalibrationSet(batches, record)


def check_data(calibration: Calibration | None, model: nn.Module) -> None:
    """Refuse data that can't be used, as far as its first item tells; a stream, which may pass only once, is not read.

    Args:
        calibration: The data; None is the text that comes with Python.
        model: The model, which may be on the meta device.

    Raises:
        CalibrationError: A file is missing, empty or of unknown form, or the data is of a kind that this model can't
            read or make.
    """
    request = calibration or Calibration()
    if is_generated(request):
        _check_generates(model)
    elif request.data is None:
        _check_default(model)
    elif isinstance(request.data, str | Path):
        _check_kind(read_items(request), model)


def is_generated(request: Calibration) -> bool:
    """Whether the model makes its own data, for which its weights must be there."""
    return isinstance(request.data, str) and request.data == GENERATED


def digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of the names, data types, shapes and bytes of all tensors, in order, as 64 hexadecimal digits."""
    made = hashlib.sha256()
    for number, batch in enumerate(batches):
        made.update(f"batch {number}\n".encode())
        for name, value in sorted(batch.items()):
            made.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _given(request: Calibration, items: Items, model: nn.Module, source: Source) -> _Made:
    """Batches of data that was given."""
    _check_kind(items, model)
    if items.kind in _WORDS:
        return _of_text(request, items, model, source)
    if items.kind in ("images", "sound"):
        return _Made(items.source, stacked(media_rows(items, request, model, source), request.batch_size))
    given = tensor_batches(items, model) if items.kind == "tensors" else items.values
    batches = ready_batches(given, model, request.rows, request.batch_size)
    if not batches:
        raise CalibrationError(
            "Calibration has 0 usable rows: every row is padding.", "check attention_mask, or pass texts"
        )
    return _Made(items.source, batches)


def _check_kind(items: Items, model: nn.Module) -> None:
    """Refuse text for a model that reads none."""
    if items.kind in _WORDS and not reads_tokens(model):
        raise CalibrationError(
            f"The calibration data holds {items.kind}, and {type(model).__name__} reads no tokens.",
            "pass images, sound or ready batches",
        )


def _of_text(request: Calibration, items: Items, model: nn.Module, source: Source) -> _Made:
    """Batches of texts, conversations or rows of token ids."""
    if items.kind == "token ids":
        text, tokenizer = token_rows(items, request, model), None
    else:
        tokenizer = tokenizer_of(request, model, source)
        text = text_rows(items, request, model, tokenizer)
    if not text.rows:
        raise CalibrationError(
            f"Calibration has 0 usable rows: {text.read} read, {text.empty} without any token.",
            "pass texts that hold words",
        )
    batches = padded(text.rows, _padding_id(tokenizer, model), request.batch_size)
    return _Made(items.source, batches, text.packed, text)


def _default(request: Calibration, model: nn.Module, source: Source) -> _Made:
    """Batches of the text that comes with Python.

    Raises:
        CalibrationError: The model is no language model.
    """
    _check_default(model)
    tokenizer = tokenizer_of(request, model, source)
    logger.warning("%s", NOTE)
    packed = Calibration(
        default_texts(),
        tokenizer=tokenizer,
        rows=request.rows,
        sequence_length=request.sequence_length,
        seed=request.seed,
        pack=request.pack if request.pack is not None else True,
        batch_size=request.batch_size,
    )
    made = _of_text(packed, read_items(packed), model, None)
    return _Made("default", made.batches, made.packed, made.text)


def _check_default(model: nn.Module) -> None:
    """Refuse to go without data for a model that is no language model."""
    if not is_text_model(model):
        raise CalibrationError(
            f"This method needs calibration data, none was given, and {type(model).__name__} has no default: it is no "
            "language model.",
            _GIVE_DATA,
        )


def _generated(request: Calibration, model: nn.Module, source: Source) -> _Made:
    """Batches that the model makes itself.

    Raises:
        CalibrationError: It can't: it neither continues text nor has batch normalisation, or has no values yet.
    """
    _check_generates(model)
    on_meta = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if on_meta is not None:
        raise CalibrationError(
            f"{type(model).__name__} can't make its own calibration data before its weights are loaded ({on_meta} is "
            "on the meta device).",
            "load the model, then hfc.quantize(model, config)",
        )
    if samples(model):
        rows = generated_tokens(model, request, source)
        return _Made("self-generated", padded(rows, 0, request.batch_size))
    return _Made("distilled", distilled_images(model, request, source))


def _check_generates(model: nn.Module) -> None:
    """Refuse a model that can't make its own data."""
    if not samples(model) and not has_batch_norm(model):
        raise CalibrationError(
            f"{type(model).__name__} can't make its own calibration data: it neither continues text nor has batch "
            "normalisation.",
            _GIVE_DATA,
        )


def _recorded(made: _Made, batches: Sequence[dict[str, Tensor]], request: Calibration) -> CalibrationRecord:
    """What a checkpoint says of the data."""
    counts = [token_count(batch) for batch in batches]
    known = [count for count in counts if count is not None]
    return CalibrationRecord(
        source=made.source,
        sha256=digest(batches),
        rows=sum(row_count(batch) for batch in batches),
        tokens=sum(known) if known else None,
        sequence_length=max((batch["input_ids"].shape[-1] for batch in batches if "input_ids" in batch), default=None),
        seed=request.seed,
        packed=made.packed,
    )


def _check_amount(record: CalibrationRecord, made: _Made, request: Calibration) -> None:
    """Refuse fewer rows or tokens than the request accepts.

    Raises:
        CalibrationError: There are fewer.
    """
    detail = f" of {made.text.read} texts, {made.text.empty} without any token" if made.text is not None else ""
    least = min(request.min_rows, request.rows)
    if record.rows < least:
        shorter = max((record.tokens or 0) // least, 2)
        knob = f"sequence_length={shorter}" if made.packed else "more data"
        raise CalibrationError(
            f"Calibration has {record.rows} usable rows{detail}, fewer than min_rows={least}.",
            f"{knob}, or Calibration(data, min_rows={max(record.rows, 1)})",
        )
    if record.tokens is not None and record.tokens < request.min_tokens:
        raise CalibrationError(
            f"Calibration has {record.tokens} tokens{detail}, fewer than min_tokens={request.min_tokens}.",
            f"more or longer texts, or Calibration(data, min_tokens={record.tokens})",
        )


def _padding_id(tokenizer: PreTrainedTokenizerBase | None, model: nn.Module) -> int:
    """The id to pad with: the tokenizer's or the model's, else the end token's, which the mask hides."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    candidates = [
        tokenizer.pad_token_id if tokenizer is not None else None,
        config_int(config, "pad_token_id") if config is not None else None,
        tokenizer.eos_token_id if tokenizer is not None else None,
        config_int(config, "eos_token_id") if config is not None else None,
    ]
    return next((int(value) for value in candidates if value is not None and value >= 0), 0)
