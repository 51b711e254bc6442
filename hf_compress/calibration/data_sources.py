"""Calibration data of any form as a stream of items of one kind, in drawn order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.config import Calibration
from ..core.errors import CalibrationError, first_line, listed, nearest

Kind = Literal["texts", "conversations", "token ids", "batches", "tensors", "images", "sound"]

COLUMNS = ("audio", "image", "img", "text", "messages", "conversations", "input_ids", "sentence", "content")
"""Columns that are looked for where none is named, the first one found counts."""

TRANSCRIPTS = ("text", "sentence", "transcription")
"""Columns with what is said in the sound beside them."""

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_FORMS = 'calibration=["a text", "another text"], a datasets.Dataset, a file, a DataLoader, images, or ready batches'
_FILES = "a line per text (.txt), an object per line (.jsonl), or a table (.parquet)"
_STREAMED = 16
"""Items that are read of a stream without length, per row asked for; the rows are drawn from them."""


@dataclass(frozen=True)
class Items:
    """Calibration data before it becomes tensors.

    Attributes:
        source: What the record calls it.
        kind: What every item is.
        values: The items, in drawn order. Dictionaries of a dataset are reduced to the column that counts.
        total: How many there are, where that is known.
    """

    source: str
    kind: Kind
    values: Iterator[Any]
    total: int | None = None


def read_items(request: Calibration, data: Any = None) -> Items:
    """Tell what data is, and draw from it.

    Args:
        request: The column, and seed and rows of the draw.
        data: The data, where it isn't the request's.

    Raises:
        CalibrationError: The data is empty, of unknown form, or can't be read.
    """
    data = request.data if data is None else data
    if isinstance(data, str | Path):
        return _described("file", iter(_drawn(_file(data), request)), request)
    if isinstance(data, DataLoader):
        return _described("batches", _loaded(data, request), request)
    if _is_dataset(data):
        return _described("dataset", _dataset(data, request), request)
    if isinstance(data, Mapping):
        return _described(None, iter(_of_mapping(data)), request)
    if _is_item(data):
        data = [data] if not isinstance(data, np.ndarray) or data.ndim < 4 else list(data)
    if isinstance(data, Sequence):
        values = [data] if data and _is_message(data[0]) else data
        return _described(None, iter(_drawn(values, request)), request, len(values))
    if isinstance(data, Dataset):
        return _described("dataset", _drawn_from(data, request), request)
    if isinstance(data, Iterable):
        return _described(None, iter(_drawn(list(islice(data, _stream_length(request))), request)), request)
    raise CalibrationError(f"Calibration data is a {type(data).__name__}.", _FORMS)


def order(count: int, seed: int) -> list[int]:
    """A permutation of 0 … count - 1, the same for the same seed."""
    return [int(index) for index in torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def _described(source: str | None, values: Iterator[Any], request: Calibration, total: int | None = None) -> Items:
    """Items whose kind is that of the first one."""
    try:
        first = next(values)
    except StopIteration:
        raise CalibrationError("There is no calibration data: it is empty.", _FORMS) from None
    kind = kind_of(reduced(first, request))

    def checked() -> Iterator[Any]:
        for index, value in enumerate(chain([first], values)):
            item = reduced(value, request)
            found = kind_of(item)
            if found != kind:
                raise CalibrationError(f"Calibration data mixes {kind} and {found} (item {index}).", "give one kind")
            yield item

    return Items(source or ("batches" if kind == "tensors" else kind), kind, checked(), total)


def reduced(value: Any, request: Calibration) -> Any:
    """An item without its label, and the column that counts of an object.

    Raises:
        CalibrationError: The object has no such column.
    """
    if isinstance(value, tuple | list) and len(value) == 2 and _is_label(value[1]) and not isinstance(value[0], int):
        return reduced(value[0], request)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):  # what a DataLoader makes of tuples
        return value[0]
    if not isinstance(value, Mapping) or "array" in value or _is_batch(value):
        return value
    known = [str(name) for name in value]
    column = request.column or next((name for name in COLUMNS if name in value), None)
    if column is None or column not in value:
        wanted = f"column {column!r}. {nearest(column, known)}".rstrip() if column else "column with a usual name."
        raise CalibrationError(
            f"Calibration data has the columns {listed(known, 8)}, and no {wanted}",
            f'Calibration(data, column="{(known or ["text"])[0]}")',
        )
    if column == "input_ids":
        return {name: value[name] for name in ("input_ids", "attention_mask") if name in value}
    spoken = next((value[name] for name in TRANSCRIPTS if isinstance(value.get(name), str)), None)
    if isinstance(value[column], Mapping) and "array" in value[column] and spoken is not None:
        return {**value[column], "text": spoken}
    return value[column]


def kind_of(value: Any) -> Kind:
    """What an item is.

    Raises:
        CalibrationError: None of what calibration data can be.
    """
    if isinstance(value, str):
        return "texts"
    if isinstance(value, Mapping):
        return _kind_of_mapping(value)
    if isinstance(value, list) and value and _is_message(value[0]):
        return "conversations"
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return "token ids"
    if isinstance(value, Tensor):
        return _kind_of_tensor(value)
    if isinstance(value, np.ndarray):
        if value.ndim == 1:
            return "token ids" if np.issubdtype(value.dtype, np.integer) else "sound"
        return "images"
    if _is_picture(value):
        return "images"
    shown = "an empty list" if isinstance(value, list) and not value else f"a {type(value).__name__}"
    raise CalibrationError(f"An item of the calibration data is {shown}, no text, tensor, image or batch.", _FORMS)


def _kind_of_mapping(value: Mapping[str, Any]) -> Kind:
    if "array" in value:
        return "sound"
    if _is_batch(value):
        return "batches"
    if "input_ids" in value:
        return "token ids"
    raise CalibrationError(f"A batch has no tensor, only the keys {listed(map(str, value))}.", 'return_tensors="pt"')


def _kind_of_tensor(value: Tensor) -> Kind:
    """Bytes are images as they come from a file; other integers are token ids."""
    if value.dtype == torch.uint8 and value.ndim >= 2:
        return "images"
    if not value.is_floating_point():
        return "token ids" if value.ndim == 1 else "tensors"
    return "sound" if value.ndim == 1 else "tensors"


def _is_item(data: Any) -> bool:
    """Whether data is one item and no list of them."""
    return isinstance(data, Tensor | np.ndarray) or _is_picture(data)


def _is_batch(data: Mapping[str, Any]) -> bool:
    """Whether a dictionary holds tensors, or arrays under other names than those of columns."""
    named = any(name in data for name in COLUMNS if name != "input_ids")
    arrays = not named and any(isinstance(value, np.ndarray) and value.ndim > 1 for value in data.values())
    return arrays or any(isinstance(value, Tensor) for value in data.values())


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_label(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.ndim == 1 and not value.is_floating_point())
    return isinstance(value, int | np.integer)


def _is_picture(value: Any) -> bool:
    """Whether something is a PIL image; nothing is, as long as nobody has imported PIL."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _is_dataset(data: Any) -> bool:
    """Whether something is of `datasets`, which is slow to import: nothing is, as long as nobody has."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, module.Dataset | module.IterableDataset)


def _stream_length(request: Calibration) -> int:
    return max(_STREAMED * request.rows, 1024)


def _drawn(values: Sequence[Any], request: Calibration) -> list[Any]:
    """All values, in drawn order."""
    return [values[index] for index in order(len(values), request.seed)]


def _drawn_from(data: Any, request: Calibration) -> Iterator[Any]:
    """A `torch.utils.data.Dataset`, item by item in drawn order; one without length in its own."""
    try:
        count = len(data)
    except TypeError:
        raise CalibrationError(
            f"The dataset {type(data).__name__} has no length.", "pass a DataLoader of it, or a list of its items"
        ) from None
    return (data[index] for index in order(count, request.seed))


def _dataset(data: Any, request: Calibration) -> Iterator[Any]:
    """A `datasets.Dataset` in drawn order; of a streamed one, its first rows in drawn order."""
    names = data.column_names
    if request.column is not None and names is not None and request.column not in names:
        raise CalibrationError(
            f"The dataset has the columns {listed(names, 8)}, and no {request.column!r}. "
            f"{nearest(request.column, names)}".rstrip(),
            f'column="{(names or ["text"])[0]}"',
        )
    if sys.modules["datasets"].IterableDataset in type(data).__mro__:
        return iter(_drawn(list(islice(data, _stream_length(request))), request))
    return (data[index] for index in order(len(data), request.seed))


def _of_mapping(data: Mapping[str, Any]) -> list[Any]:
    """One ready batch, or the rows of what a tokenizer made of several texts."""
    if _is_batch(data):
        return [data]
    if _is_message(data) or isinstance(data.get("input_ids"), list):
        if _is_message(data):
            return [[data]]
        ids = data["input_ids"]
        rows = ids if ids and isinstance(ids[0], list) else [ids]
        masks = data.get("attention_mask")
        masks = masks if masks and isinstance(masks[0], list) else [masks] * len(rows)
        return [
            {"input_ids": row, **({"attention_mask": mask} if mask else {})}
            for row, mask in zip(rows, masks, strict=True)
        ]
    names = list(map(str, data))
    if any(_is_dataset(value) for value in data.values()):
        raise CalibrationError(f"The data has the splits {listed(names)}.", f'pass one of them: data["{names[0]}"]')
    raise CalibrationError(
        f"A ready batch holds tensors; this {type(data).__name__} has none under its keys {listed(names)}.",
        'tokenizer(texts, return_tensors="pt", padding=True)',
    )


def _loaded(loader: DataLoader[Any], request: Calibration) -> Iterator[Any]:
    """The batches of a loader in its own order.

    A loader without a generator of its own draws from the global random state: that is set aside, and one that
    follows from the seed is in its place for as long as a batch is made.
    """
    state = torch.Generator().manual_seed(request.seed).get_state()
    batches: Iterator[Any] | None = None
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(state)
            batches = iter(loader) if batches is None else batches
            batch = next(batches, None)
            state = torch.random.get_rng_state()
        if batch is None:
            return
        yield batch


def _file(path: str | Path) -> list[Any]:
    """The texts or objects of a file.

    Raises:
        CalibrationError: There is no such file, it has another form, or it can't be read.
    """
    if "\0" in str(path) or Path(path).suffix.lower() not in _SUFFIXES:
        raise CalibrationError(
            f"Calibration data is {str(path)[:60]!r}, which is no file of a known form.",
            f"a file with {_FILES}; a single text goes into a list: calibration=[text]",
        )
    file = Path(path)
    try:
        values = _READERS[file.suffix.lower()](file)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} can't be read: {first_line(error)}.", _FILES) from None
    if not values:
        raise CalibrationError(f"{file} holds no calibration data: it is empty.", _FILES)
    return values


def _text_lines(file: Path) -> list[Any]:
    """Every line that is not blank."""
    return [text for line in file.read_text(encoding="utf-8-sig").split("\n") if (text := line.strip())]


def _objects(file: Path) -> list[Any]:
    """An object, or a text, from every line that is not blank."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{file}, line {number} is no JSON: {error}.", '{"text": "..."}') from None
        if not isinstance(value, dict | str):
            raise CalibrationError(f"{file}, line {number} is a {type(value).__name__}, no object.", '{"text": "..."}')
        found.append(value)
    return found


def _table(file: Path) -> list[Any]:
    """The rows of a table."""
    import pyarrow  # here, since it is slow to import
    from pyarrow import parquet

    try:
        return list(parquet.read_table(file, partitioning=None).to_pylist())
    except pyarrow.ArrowException as error:
        raise CalibrationError(
            f"{file} is no readable parquet file: {first_line(error)}.", "write it again, or pass its texts as a list"
        ) from None


_READERS: dict[str, Callable[[Path], list[Any]]] = {".txt": _text_lines, ".jsonl": _objects, ".parquet": _table}
