"""Ready batches: checked, split, and completed with what a decoder needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import CalibrationError, listed, nearest
from .data_model import (
    arguments,
    config_int,
    decoder_start,
    dtype_of,
    position_limit,
    takes_anything,
    takes_decoder_inputs,
    vocabulary,
)
from .padding import key_mask, padding_of, row_count

Batch = dict[str, Tensor]

_LABELS = ("labels", "label", "label_ids")
IGNORED = -100
"""A label that counts for nothing."""


def ready_batches(batches: Iterable[Mapping[str, Any]], model: nn.Module, rows: int, batch_size: int) -> list[Batch]:
    """Bring given batches to at most `batch_size` rows, the first `rows` of them without rows of padding alone.

    A batch whose tensors don't all have one entry per row, such as images of several texts, stays whole.

    Raises:
        CalibrationError: A value is no tensor, or no argument of the model's forward.
    """
    found: list[Batch] = []
    left = rows
    for given in batches:
        batch = _without_padding(_tensors(given, model), model)
        if not batch:
            continue
        count = row_count(batch)
        if any(value.ndim == 0 or len(value) != count for value in batch.values()):
            found.append(batch)
            left -= count
        else:
            count = min(count, left)
            found += [
                {name: value[start : min(start + batch_size, count)] for name, value in batch.items()}
                for start in range(0, count, batch_size)
            ]
            left -= count
        if left <= 0:
            break
    return found


def token_count(batch: Batch) -> int | None:
    """Tokens of a batch that are no padding; None where it has no text."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return None
    kept = key_mask(mask, row_count(batch))
    return int(kept.sum()) if kept is not None and kept.shape == ids.shape else ids.numel()


def completed(batch: Batch, model: nn.Module) -> Batch:
    """A batch with inputs for the decoder, where the model has one, and without labels.

    The decoder gets the labels, or else the text itself, moved right behind its start token; without either, only
    that token.
    """
    labels = next((batch[name] for name in _LABELS if name in batch), None)
    batch = {name: value for name, value in batch.items() if name not in _LABELS}
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
    if not isinstance(model, PreTrainedModel) or not takes_decoder_inputs(model) or given:
        return batch
    start, pad = decoder_start(model), config_int(model.config, "pad_token_id") or 0
    mask = None
    if labels is not None and labels.ndim == 2:
        mask = labels != IGNORED
        labels = labels.masked_fill(~mask, pad)
    elif (labels := batch.get("input_ids")) is not None:
        mask = padding_of(batch, "attention_mask")
    if labels is None:
        return {**batch, "decoder_input_ids": torch.full((row_count(batch), 1), start)}
    batch["decoder_input_ids"] = _moved(labels, start)
    if mask is not None and not bool(mask.all()) and "decoder_attention_mask" in arguments(model):
        batch["decoder_attention_mask"] = _moved(mask.long(), 1)
    return batch


def check_batches(batches: list[Batch], model: nn.Module) -> None:
    """Refuse what the model can't read.

    Raises:
        CalibrationError: A token id that is no whole number or has no embedding, a row without position, a mask of
            other tokens than there are, or a value that is not finite.
    """
    known = vocabulary(model)
    limits = {"input_ids": position_limit(model), "decoder_input_ids": position_limit(model, decoder=True)}
    for number, batch in enumerate(batches):
        for mask in ("attention_mask", "decoder_attention_mask"):
            _check_mask(batch, mask, number)
        for name, value in batch.items():
            if name in limits and value.numel():
                _check_ids(name, value, known, limits[name], model)
            if value.is_floating_point() and "mask" not in name and not bool(value.isfinite().all()):
                raise CalibrationError(
                    f"{name} of batch {number} holds values that are not finite.", "drop or repair these rows"
                )


def _check_mask(batch: Batch, name: str, number: int) -> None:
    """Refuse a mask that is not one of the batch's tokens."""
    what = name.removesuffix("attention_mask")
    mask, ids, embedded = batch.get(name), batch.get(f"{what}input_ids"), batch.get(f"{what}inputs_embeds")
    shape = ids.shape if ids is not None else embedded.shape[:-1] if embedded is not None else None
    if mask is None or shape is None or mask.shape == shape:
        return
    pairs = mask.ndim in (3, 4) and mask.shape[-1] == shape[-1] and len(mask) in (1, shape[0])
    if not pairs:
        raise CalibrationError(
            f"{name} of batch {number} has the shape {list(mask.shape)}, but there are {list(shape)} tokens.",
            "give a mask of rows × tokens that the tokenizer made together with the ids",
        )


def _check_ids(name: str, ids: Tensor, known: int | None, limit: int | None, model: nn.Module) -> None:
    """Refuse token ids that the model can't look up."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"{name} holds values of {ids.dtype}; token ids are whole numbers.", f'batch["{name}"].long()'
        )
    if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise CalibrationError(
            f"Token ids in {name} run from {int(ids.min())} to {int(ids.max())}, but {type(model).__name__} has "
            f"{known} embeddings.",
            "pass the tokenizer that belongs to the model: Calibration(data, tokenizer=...)",
        )
    if limit is not None and ids.shape[-1] > limit:
        raise CalibrationError(
            f"A batch has rows of {ids.shape[-1]} tokens in {name}, more than the {limit} positions of "
            f"{type(model).__name__}.",
            f"cut them: tokenizer(..., truncation=True, max_length={limit})",
        )


def _moved(values: Tensor, first: int) -> Tensor:
    """Rows moved right by one, behind a first value."""
    return torch.cat([torch.full_like(values[:, :1], first), values[:, :-1]], dim=1)


def _tensors(given: Mapping[str, Any], model: nn.Module) -> Batch:
    """The tensors of a batch that forward takes, floating ones in the model's data type."""
    known = arguments(model)
    read = takes_anything(model) and any(name in known for name in given)  # it passes the others on
    made: Batch = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in known and name not in _LABELS and not read:
            raise CalibrationError(
                f"A batch has {name!r}, which {type(model).__name__} does not take. {nearest(name, known)}".rstrip(),
                f"leave it out; it takes {listed(known, 8)}",
            )
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor):
            raise CalibrationError(
                f"{name!r} of a batch is a {type(value).__name__} and no tensor.",
                'tokenizer(..., return_tensors="pt")',
            )
        made[name] = dtype_of(model, value.detach().cpu())
    return made


def _without_padding(batch: Batch, model: nn.Module) -> Batch:
    """A batch without rows that are padding alone: by their mask, or, without one, by the model's padding id."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    pad = config_int(model.config, "pad_token_id") if isinstance(model, PreTrainedModel) else None
    kept = key_mask(mask, row_count(batch))
    if kept is not None:
        keep = kept.any(dim=1)
    elif mask is None and ids is not None and ids.ndim == 2 and pad is not None:
        keep = (ids != pad).any(dim=1)
    else:
        return batch
    if bool(keep.all()):
        return batch
    if not bool(keep.any()):
        return {}
    return {name: value[keep] if value.ndim and len(value) == len(keep) else value for name, value in batch.items()}
