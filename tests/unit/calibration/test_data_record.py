from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import hf_compress as hfc
from hf_compress.calibration.data import digest, prepare
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.config import Calibration
from hf_compress.core.plan import CalibrationRecord, Plan
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.pipeline.planning import plan
from tests._utils.tiny import tiny, tiny_tokenizer

SECRET = "a sentence that nobody else may read"


def test_data_is_copied_by_reference_and_never_shown() -> None:
    request = Calibration([SECRET], rows=4)
    assert copy.deepcopy({"calibration": request})["calibration"] is request
    assert SECRET not in repr(request)
    assert "rows=4" in repr(request)


def test_a_plan_carries_the_record_and_no_text() -> None:
    model = tiny("llama")
    record = prepare(Calibration([SECRET] * 99, tokenizer=tiny_tokenizer(), seed=5), model).record
    made = plan(model, RTNQuantConfig()).model_copy(update={"calibration": record})
    text = made.model_dump_json()
    assert SECRET not in text
    assert Plan.model_validate_json(text) == made
    assert json.loads(text)["calibration"]["seed"] == 5


def test_a_plan_from_before_there_were_records_is_read() -> None:
    made = plan(tiny("llama"), RTNQuantConfig())
    values = json.loads(made.model_dump_json())
    assert values.pop("calibration") is None
    assert Plan.model_validate(values) == made


def test_a_record_with_no_hash_is_refused() -> None:
    with pytest.raises(ValueError, match="sha256"):
        CalibrationRecord(source="texts", sha256="x", rows=1, seed=0)


def test_the_hash_is_of_names_types_shapes_and_bytes() -> None:
    value = torch.arange(6)
    same = digest([{"a": value, "b": value.float()}])
    assert digest([{"b": value.float(), "a": value.clone()}]) == same
    others = [
        [{"a": value, "c": value.float()}],
        [{"a": value, "b": value}],
        [{"a": value.reshape(2, 3), "b": value.float()}],
        [{"a": value.flip(0), "b": value.float()}],
        [{"a": value}, {"b": value.float()}],
    ]
    assert len({same, *map(digest, others)}) == 6


def test_the_hash_reads_transposed_and_empty_tensors_and_bfloat16() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    assert digest([{"a": value.t()}]) == digest([{"a": value.t().contiguous()}])
    assert digest([{"a": value.bfloat16()}]) != digest([{"a": value.half()}])
    assert digest([{"a": value[:0]}]) == digest([{"a": value[:0].clone()}])


def test_a_saved_model_tells_of_its_data_and_holds_none_of_it(tmp_path: Path, worker: CleanWorker) -> None:
    data = Calibration([f"{SECRET} {number}" for number in range(60)], tokenizer=tiny_tokenizer(), rows=16)
    model = hfc.quantize(tiny("llama"), hfc.GPTQQuantConfig(bits=4, calibration=data))
    hfc.save(model, tmp_path / "out", worker=worker)
    (tmp_path / "plain").mkdir()
    model.save_pretrained(tmp_path / "plain")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    record = json.loads((tmp_path / "out" / "hf_compress.json").read_text())["plan"]["calibration"]
    assert CalibrationRecord(**record) == prepare(data, tiny("llama")).record
    assert SECRET not in hfc.GPTQQuantConfig(bits=4, calibration=data).to_json_string(use_diff=False)


def test_a_model_that_does_not_tell_its_embeddings_still_takes_batches() -> None:
    model = tiny("clip")
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    batch = {"input_ids": torch.full((8, 9), 7), "pixel_values": torch.zeros(8, 3, 16, 16)}
    assert prepare(Calibration([batch], min_tokens=1), model).record.rows == 8


def test_padding_of_a_mask_of_pairs_is_not_counted() -> None:
    ids = torch.full((8, 4), 7)
    mask = torch.ones(4, 4).tril().bool().expand(8, 1, 4, 4) & (torch.arange(4) < 3)
    mask = mask.clone()
    mask[7] = False
    record = prepare(
        Calibration([{"input_ids": ids, "attention_mask": mask}], min_rows=1, min_tokens=1), tiny("llama")
    )
    assert (record.record.rows, record.record.tokens) == (7, 21)
