"""Evaluation data from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_compress.core.errors import EvaluationDataError
from hf_compress.evaluation.data_files import read_data


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two \r\nthree\x0bstill three\n", ["one", "two", "three\x0bstill three"]),
        ("a.TXT", b"\xef\xbb\xbfone", ["one"]),
        ("a.jsonl", '{"text": "one", "label": 1, "more": 2}\n\n{"text": "two", "label": 0}', [("one", 1), ("two", 0)]),
        ("a.jsonl", '{"text": "one"}\n{"text": "two", "label": null}', ["one", "two"]),
        ("a.csv", 'label,text\n1,"one, and\nmore ""so"""\n0,two\n', [('one, and\nmore "so"', 1), ("two", 0)]),
        ("a.csv", "id,text\n7,one\n", ["one"]),
        ("a.csv", "\ufefftext,label\none,1\n\ntwo,0\n", [("one", 1), ("two", 0)]),
        ("a.tsv", "text\tlabel\none, really\t 2 \n", [("one, really", 2)]),
    ],
)
def test_forms(tmp_path: Path, name: str, content: str | bytes, expected: list[object]) -> None:
    assert read_data(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", "x", "'.parquet', which is no known form"),
        ("a.txt", " \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "can't be read"),
        ("a.jsonl", '{"text": "one"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", '["one"]', "line 1 is no object with the key text"),
        ("a.jsonl", '{"sentence": "one"}', "line 1 is no object with the key text"),
        ("a.jsonl", '{"text": 5}', "line 1: the text is 5"),
        ("a.jsonl", '{"text": "one", "label": true}', "the label is True"),
        ("a.jsonl", '{"text": "one", "label": 1}\n{"text": "two"}', "line 2 has no label"),
        ("a.csv", "sentence,label\none,1\n", "the columns sentence, label, and none is text"),
        ("a.csv", "", "the columns none"),
        ("a.csv", "text,label\n", "holds no text"),
        ("a.csv", "text,label\none,positive\n", "line 2: the label is 'positive'"),
        ("a.csv", "text,label\none,1\ntwo\n", "line 3 has no label"),
        ("a.csv", 'text,label\n"one,1\n', "malformed"),
        ("a.csv", "text\nhello, this is awful\n", "line 2 has 2 columns, the header 1"),
        ("a.csv", "text,label\ngood,1, but in the end bad,0\n", "line 2 has 4 columns, the header 2"),
        ("a.csv", 'text,label\n"one\nand two",1\nfine, really,0\n', "line 4 has 3 columns"),
        ("a.tsv", "text\tlabel\none\ttwo\t1\n", "line 2 has 3 columns"),
        ("a.csv", "text,text\none,two\n", "line 1 has the column text 2 times"),
        ("a.csv", "text,label,label\none,0,1\n", "line 1 has the column label 2 times"),
        ("a.csv", f"text,label\none,{'1' * 5000}\n", "line 2: the label is '1111"),
        ("a.csv", "text,label\none,-1\n", "line 2: the label is '-1', no integer from 0"),
        ("a.jsonl", '{"text": "one", "label": -1}\n', "line 1: the label is -1, no integer from 0"),
        ("a.jsonl", '{"text": "one", "label": ' + "1" * 5000 + "}\n", "line 1 is no JSON"),
        ("a.jsonl", "[" * 100000, "line 1 is no JSON"),
        ("a.csv", "text,label\n ,1\n", "line 2: the text is ' '"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(EvaluationDataError) as caught:
        read_data(written(tmp_path, name, content))
    assert words in caught.value.message
    assert caught.value.fix


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(EvaluationDataError, match="can't be read"):
        read_data(tmp_path / "absent.txt")
    with pytest.raises(EvaluationDataError, match="can't be read"):
        read_data((tmp_path / "folder.txt").mkdir() or tmp_path / "folder.txt")


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """Tokenizers fail on it, long after the file was read."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "\\ud800 a"}\n', encoding="utf-8")
    with pytest.raises(EvaluationDataError, match=r"line 2: .* holds half a character"):
        read_data(file)


def test_spaces_around_the_names_of_columns(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text, label\ngood,1\n", encoding="utf-8")
    assert read_data(file) == [("good", 1)]


@pytest.mark.parametrize("path", [b"texts.csv", "a\0.csv", None])
def test_no_path(path: object) -> None:
    with pytest.raises(EvaluationDataError, match="no file's path"):
        read_data(path)  # type: ignore[arg-type]
