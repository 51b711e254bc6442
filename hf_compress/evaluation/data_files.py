"""Evaluation data from files: texts, or texts with labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

from ..core.errors import EvaluationDataError

Row = tuple[int, object, object]
"""Line number, text, label (None if there is none), not yet checked."""

_FORMS = "one text per line (.txt), objects with text and label (.jsonl), or a header with text and label (.csv, .tsv)"
_LABEL_DIGITS = 9
_QUOTE = "quote texts that hold a delimiter or quote"


def read_data(path: object) -> list[str] | list[tuple[str, int]]:
    """Texts, or (text, label) pairs, from a file.

    `.txt`: every line that is not blank is a text. `.jsonl`: an object per line with the key `text` and, in all or
    none, `label`. `.csv` and `.tsv`: a header with the columns `text` and, optionally, `label`. Other keys and columns
    are ignored. Labels are integers from 0. UTF-8, with or without byte order mark.

    Args:
        path: The file; its suffix tells the form.

    Raises:
        EvaluationDataError: There is no such file, or it has another form; names the line.
    """
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise EvaluationDataError(f"{path!r} is no file's path.", _FORMS)
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise EvaluationDataError(f"{file} has the suffix {file.suffix!r}, which is no known form of data.", _FORMS)
    try:
        rows = list(reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationDataError(f"{file} can't be read: {error}.", "pass a text file in UTF-8") from None
    if not rows:
        raise EvaluationDataError(f"{file} holds no text.", _FORMS)
    texts = [_text(file, line, text) for line, text, _ in rows]
    unlabelled = [line for line, _, label in rows if label is None]
    if len(unlabelled) == len(rows):
        return texts
    if unlabelled:
        raise EvaluationDataError(
            f"{file}, line {unlabelled[0]} has no label, and other lines have one.", "label every text, or none"
        )
    return [(text, _label(file, line, label)) for text, (line, _, label) in zip(texts, rows, strict=True)]


def _lines(file: Path) -> Iterator[Row]:
    """A text in every line that is not blank."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if text := line.strip():
            yield number, text, None


def _objects(file: Path) -> Iterator[Row]:
    """A JSON object in every line that is not blank."""
    for number, line, _ in _lines(file):
        try:
            value = json.loads(str(line))
        except (ValueError, RecursionError) as error:  # deep nesting; integers of thousands of digits
            raise EvaluationDataError(
                f"{file}, line {number} is no JSON: {error}.", '{"text": "...", "label": 0}'
            ) from None
        if not isinstance(value, dict) or "text" not in value:
            raise EvaluationDataError(
                f"{file}, line {number} is no object with the key text.", '{"text": "...", "label": 0}'
            )
        yield number, value["text"], value.get("label")


def _table(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(file: Path) -> Iterator[Row]:
        """The rows below a header; texts may be quoted and span lines."""
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.reader(opened, delimiter=delimiter, strict=True)
            try:
                header = _header(file, next(rows, []), delimiter)
                for cells in rows:
                    if not cells:
                        continue
                    if len(cells) > len(header):
                        raise EvaluationDataError(
                            f"{file}, line {rows.line_num} has {len(cells)} columns, the header {len(header)}.",
                            _QUOTE,
                        )
                    row = dict(zip_longest(header, cells))
                    yield rows.line_num, row["text"], row.get("label")
            except csv.Error as error:
                raise EvaluationDataError(f"{file}, line {rows.line_num} is malformed: {error}.", _QUOTE) from None

    return read


def _header(file: Path, columns: list[str], delimiter: str) -> list[str]:
    """Names of columns, without spaces around them: each once, and text among them."""
    columns = [name.strip() for name in columns]
    if "text" not in columns:
        raise EvaluationDataError(
            f"{file} has the columns {', '.join(columns) or 'none'}, and none is text.",
            f"a first line such as text{delimiter!r}label".replace("'", ""),
        )
    if twice := [name for name in ("text", "label") if columns.count(name) > 1]:
        raise EvaluationDataError(
            f"{file}, line 1 has the column {twice[0]} {columns.count(twice[0])} times.", "name every column once"
        )
    return columns


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


def _text(file: Path, line: int, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise EvaluationDataError(f"{file}, line {line}: the text is {text!r}.", "a text that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise EvaluationDataError(f"{file}, line {line}: {text!r} holds half a character.", "text in UTF-8")
    return text


def _label(file: Path, line: int, label: object) -> int:
    """An integer from 0, which CSV gives as digits."""
    digits = str(label).strip() if isinstance(label, str) or type(label) is int else ""
    if digits.isascii() and digits.isdecimal() and len(digits) <= _LABEL_DIGITS:
        return int(digits)
    raise EvaluationDataError(
        f"{file}, line {line}: the label is {repr(label)[:40]}, no integer from 0.",
        "integers from 0, in the order of the model's id2label",
    )
