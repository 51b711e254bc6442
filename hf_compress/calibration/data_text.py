"""Texts, conversations and token ids as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..core.config import Calibration
from ..core.errors import CalibrationError, first_line
from .data_model import generates, position_limit, takes_decoder_inputs
from .data_sources import Items, order

DEFAULT_LENGTH = 512
_AT_ONCE = 64
"""Texts per call of the tokenizer."""

_SPARE = 4
"""When packing, as many times more tokens are collected as are needed; the rows are drawn from them."""

_PROBE = "the"


@dataclass
class TextRows:
    """Rows of token ids, none of them empty.

    Attributes:
        rows: The ids of each row.
        packed: Whether texts were joined and cut into rows of equal length.
        read: Number of texts read.
        empty: How many of them held no token.
    """

    rows: list[list[int]] = field(default_factory=list)
    packed: bool = False
    read: int = 0
    empty: int = 0


def row_length(request: Calibration, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens per row: what was asked for, or 512, or fewer if the model or its tokenizer takes fewer.

    Raises:
        CalibrationError: More were asked for than the model has positions.
    """
    limit = position_limit(model)
    if request.sequence_length is None:
        own = tokenizer.model_max_length if tokenizer is not None else None
        return int(min(value for value in (DEFAULT_LENGTH, own, limit) if value is not None))
    if limit is not None and request.sequence_length > limit:
        raise CalibrationError(
            f"sequence_length={request.sequence_length} is more than the {limit} positions of {type(model).__name__}.",
            f"sequence_length={limit}",
        )
    return request.sequence_length


def text_rows(items: Items, request: Calibration, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> TextRows:
    """Tokenize texts or conversations until there are enough rows.

    Packing joins them, with the end token between them, and cuts every `sequence_length` tokens; what the tokenizer
    puts around a text, such as a start token, is put around each row instead. Else each text is a row, cut at
    `sequence_length`.

    Raises:
        CalibrationError: A conversation can't be written out, or the model has fewer positions than asked for.
    """
    length = row_length(request, model, tokenizer)
    packs = generates(model) and not takes_decoder_inputs(model) if request.pack is None else request.pack
    made = TextRows(packed=packs)
    written = items.kind == "conversations"
    texts = (_written(value, request, tokenizer) if written else value for value in items.values)
    tokens = _tokenized(texts, tokenizer, made, special=not packs and not written)
    if packs:
        before, after = ([], []) if written else around(tokenizer)
        made.rows = _packed(tokens, request, length, before, after, tokenizer.eos_token_id)
        return made
    for ids in tokens:
        made.rows.append(_cut(ids, length, tokenizer))
        if len(made.rows) == request.rows:
            break
    return made


def token_rows(items: Items, request: Calibration, model: nn.Module) -> TextRows:
    """Rows that are token ids already; those that their mask hides are left out, the rest is cut only on request.

    Raises:
        CalibrationError: A row is no list of whole numbers, or longer than the model has positions.
    """
    limit, made = position_limit(model), TextRows()
    if request.sequence_length is not None:
        row_length(request, model, None)
    for value in items.values:
        made.read += 1
        ids = _seen(value)[: request.sequence_length]
        if limit is not None and len(ids) > limit:
            raise CalibrationError(
                f"A row of {len(ids)} tokens is longer than the {limit} positions of {type(model).__name__}.",
                f"sequence_length={limit} cuts it",
            )
        made.empty += not ids
        if ids:
            made.rows.append(ids)
        if len(made.rows) == request.rows:
            break
    return made


def padded(rows: list[list[int]], pad: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of rows of about the same length, padded on the right, where positions stay what they are.

    Args:
        rows: Token ids.
        pad: The id to pad with; the mask hides it.
        batch_size: Most rows per batch.

    Returns:
        `input_ids`, rows × tokens, int64; with `attention_mask` of the same shape, int64, where a row is padded.
    """
    rows = sorted(rows, key=len)
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = len(part[-1])
        batch = {"input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in part])}
        if len(part[0]) < longest:
            batch["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        batches.append(batch)
    return batches


def _written(messages: Any, request: Calibration, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the text that the model would see."""
    if request.chat_template is None and not tokenizer.chat_template:
        raise CalibrationError(
            f"The data holds conversations, and {type(tokenizer).__name__} has no chat template.",
            'Calibration(data, chat_template="{% for message in messages %}...{% endfor %}"), or pass texts',
        )
    from jinja2 import TemplateError  # here, since few need it

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=request.chat_template))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"A conversation doesn't fit the chat template: {first_line(error)}.",
            'messages such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        ) from None


def _tokenized(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, made: TextRows, special: bool
) -> Iterator[list[int]]:
    """The ids of every text that has any besides those that every text gets."""
    least = len(tokenizer("", verbose=False)["input_ids"]) if special else 0
    left = iter(texts)
    while chunk := list(islice(left, _AT_ONCE)):
        _check_encodable(chunk)
        for text, ids in zip(
            chunk, tokenizer(chunk, add_special_tokens=special, verbose=False)["input_ids"], strict=True
        ):
            blank = not text.strip() or len(ids) <= least
            made.read += 1
            made.empty += blank
            if not blank:
                yield list(ids)


def _check_encodable(texts: list[str]) -> None:
    """Refuse texts that UTF-8, and so a tokenizer, can't hold."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            part = text[max(error.start - 20, 0) : error.end + 20]
            raise CalibrationError(f"The text {part!r} holds half a character.", "pass text in UTF-8") from None


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after every text."""
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_PROBE)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _packed(
    tokens: Iterator[list[int]],
    request: Calibration,
    length: int,
    before: list[int],
    after: list[int],
    end: int | None,
) -> list[list[int]]:
    """Texts joined and cut: `rows` rows drawn from as many as came together."""
    room = max(length - len(before) - len(after), 1)
    joined: list[int] = []
    for ids in tokens:
        joined += ids if end is None or (ids and ids[-1] == end) else [*ids, end]
        if len(joined) >= _SPARE * request.rows * room:
            break
    count = len(joined) // room
    if not count:
        return [before + joined + after] if joined else []
    drawn = order(count, request.seed)[: request.rows]
    return [before + joined[index * room : (index + 1) * room] + after for index in drawn]


def _cut(ids: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first tokens of a text that is too long; what ends every text stays at the end."""
    if len(ids) <= length:
        return ids
    _, after = around(tokenizer)
    keep = length - len(after)
    return ids[:keep] + after if after and keep > 0 and ids[-len(after) :] == after else ids[:length]


def _seen(value: Any) -> list[int]:
    """The ids of a row that its mask does not hide."""
    ids, mask = (value["input_ids"], value.get("attention_mask")) if isinstance(value, Mapping) else (value, None)
    ids = [int(token) for token in ids]
    if mask is None:
        return ids
    if len(mask) != len(ids):
        raise CalibrationError(
            f"A row has {len(ids)} tokens and a mask of {len(mask)}.", "one mask value per token, or no mask"
        )
    return [token for token, shown in zip(ids, mask, strict=True) if shown]
