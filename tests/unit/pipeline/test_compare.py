"""`compare`: what ships is what is measured, failures are rows, and everything is checked before the first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import hf_compress as hfc
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    AlreadyQuantizedError,
    ConfigError,
    EvaluationDataError,
    GroupSizeError,
    InputError,
    MeasurementError,
    ModelNotFoundError,
    OutputExistsError,
    UnsupportedModelError,
)
from hf_compress.evaluation.comparison_files import read_comparison
from hf_compress.evaluation.size import disk_bytes, stored_bytes
from hf_compress.pipeline.compare_names import config_name, named_configs, request_of, unique_name
from tests._utils.tiny import tiny, tiny_dir, tiny_tokenizer

INT4 = hfc.RTNQuantConfig(bits=4, group_size=32)
INT8 = hfc.RTNQuantConfig(bits=8, group_size="channel")
IMPOSSIBLE = hfc.RTNQuantConfig(bits=4, group_size=48)
LABELLED = [(f"text number {index} of these", index % 3) for index in range(12)]
SHORT = {"input_ids": torch.arange(12).view(2, 6) + 5}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir("bert-classifier", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def out(bert: Path, worker: CleanWorker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three configurations of a classifier, one of which fails, with their checkpoints. Tests must not change it."""
    path = tmp_path_factory.mktemp("compared") / "comparison"
    steps: list[tuple[int, int]] = []
    hfc.compare(
        bert,
        [INT4, IMPOSSIBLE, hfc.Int8DynamicQuantConfig()],
        LABELLED,
        tokenizer=tiny_tokenizer(),
        inputs=[SHORT, {"input_ids": torch.arange(5, 25).view(1, 20)}],
        out=path,
        pairs=8,
        keep_checkpoints=True,
        progress=lambda *step: steps.append(step),
        worker=worker,
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    return path


def test_everything_is_measured_of_each(out: Path, bert: Path) -> None:
    found = read_comparison(out)
    assert (found.model, found.architecture) == ("bert-classifier", "BertForSequenceClassification")
    assert [entry.name for entry in found.entries] == ["rtn-4bit-g32", "rtn-4bit-g48", "int8-dynamic"]
    baseline = AutoModelForSequenceClassification.from_pretrained(bert)
    assert (found.baseline.dtype, found.baseline.disk_weights) == ("float32", stored_bytes(baseline))
    assert list(found.reports) == ["rtn-4bit-g32", "int8-dynamic"]
    for report in found.reports.values():
        assert report.proof is not None
        assert report.proof.level == "full"
        assert list(report.latency or {}) == ["input_ids 2×6", "input_ids 1×20"]
        assert report.quality is not None
        assert report.quality.result.kind == "classification"
        assert report.quality.result.baseline_accuracy == found.baseline.quality
        assert report.size.baseline_disk_weights == found.baseline.disk_weights
    kernels = found.reports["int8-dynamic"].kernels
    assert sum(kernels.values()) == 13
    assert set(kernels) <= {"int8-matmul", "reference"}  # the kernel's probe may reject it on a busy machine
    assert found.entries[0].request["group_size"] == 32


def test_a_refused_configuration_is_a_row(out: Path) -> None:
    entry = read_comparison(out).entries[1]
    assert entry.report is None
    assert entry.error is not None
    assert entry.error.code == GroupSizeError.code
    assert "group_size=48" in entry.error.message
    assert entry.error.fix
    assert entry.checkpoint is None


def test_kept_checkpoints_are_what_was_measured(out: Path) -> None:
    found = read_comparison(out)
    assert [entry.checkpoint for entry in found.entries] == [
        "checkpoints/rtn-4bit-g32", None, "checkpoints/int8-dynamic",
    ]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"checkpoints", "comparison.json", "comparison.md", "pareto.png"}
    for entry in found.entries:
        if entry.checkpoint and entry.report:
            path = out / entry.checkpoint
            assert hfc.inspect(path).proof == entry.report.proof
            assert disk_bytes(path) == entry.report.size.disk
            assert (path / "tokenizer.json").is_file()


def test_taken_output_is_refused_before_the_model_is_looked_at(out: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        hfc.compare("no/such-model", [INT4], out=out)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"holds no comparison\.json, so it is no comparison"):
        hfc.compare("no/such-model", [INT4], out=model, overwrite=True)
    assert (model / "config.json").read_text() == "{}"


def test_a_live_model_stays_as_it_is_and_nothing_else_is_left(
    worker: CleanWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    found = hfc.compare(
        model,
        {"eight": INT8, "needs-an-id": BitsAndBytesConfig(load_in_8bit=True)},
        ["a text of some length"] * 3,
        tokenizer=tiny_tokenizer(),
        inputs=SHORT,
        pairs=8,
        worker=worker,
    )
    assert list(found.reports) == ["eight"]
    refused = found.entries[1].error
    assert refused is not None
    assert refused.code == UnsupportedModelError.code
    assert plan_of(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    quality = found.reports["eight"].quality
    assert quality is not None
    assert quality.result.kind == "causal-lm"
    assert found.baseline.quality == quality.result.baseline_perplexity
    assert [entry.checkpoint for entry in found.entries] == [None, None]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_overwrite_replaces_a_comparison(out: Path, worker: CleanWorker, tmp_path: Path) -> None:
    path = tmp_path / "comparison"
    path.mkdir()
    (path / "comparison.json").write_text("old")
    found = hfc.compare(tiny("bert"), [INT8], inputs=SHORT, out=path, pairs=8, overwrite=True, worker=worker)
    assert read_comparison(path) == found
    assert {file.name for file in path.iterdir()} == {"comparison.json", "comparison.md", "pareto.png"}
    assert found.baseline.quality is None
    assert "Quality was not measured: no data was given." in found.notes
    assert [file.name for file in tmp_path.iterdir()] == ["comparison"]


def test_the_original_keeps_the_data_type_of_its_checkpoint(worker: CleanWorker, tmp_path: Path) -> None:
    """Against a float32 copy of a bfloat16 checkpoint, everything would look half as large as it is."""
    model = tiny_dir("llama", tmp_path, dtype=torch.bfloat16)
    found = hfc.compare(model, [INT8], inputs=SHORT, pairs=8, worker=worker)
    assert found.baseline.dtype == "bfloat16"
    assert found.baseline.disk_weights == stored_bytes(tiny("llama")) // 2


def test_all_failing_is_an_error_of_the_first_kind_and_leaves_nothing(bert: Path, tmp_path: Path) -> None:
    skipped = hfc.RTNQuantConfig(skip=["no.such.weight"])
    with pytest.raises(GroupSizeError) as caught:
        hfc.compare(bert, [IMPOSSIBLE, skipped], inputs=SHORT, out=tmp_path / "out")
    assert "All 2 configurations failed." in caught.value.message
    assert "rtn-4bit-g64-skip: [HFC201]" in caught.value.message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GroupSizeError, match="rtn-4bit-g48: group_size=48"):
        hfc.compare(bert, [IMPOSSIBLE], inputs=SHORT)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"configs": []}, ConfigError, "no configuration to compare"),
        ({"configs": "rtn"}, ConfigError, "configs is a str"),
        ({"configs": INT4}, ConfigError, "configs is a RTNQuantConfig"),
        ({"configs": ["rtn"]}, ConfigError, "has a str"),
        ({"configs": {"a/b": INT4}}, ConfigError, "'a/b' can't be the name"),
        ({"configs": {"original": INT4}}, ConfigError, "'original' can't be the name"),
        ({"configs": {"Original": INT4}}, ConfigError, "'Original' can't be the name"),
        ({"configs": {"int4": INT4, "INT4": INT4}}, ConfigError, "'int4' and 'INT4' are one name"),
        ({"pairs": 3}, MeasurementError, "pairs=3"),
        ({"task": "translation"}, EvaluationDataError, "translation"),
        ({"progress": 5}, ConfigError, "progress is a int"),
        ({"keep_checkpoints": True}, ConfigError, "needs a place"),
        ({"model_or_id": nn.Linear(8, 8)}, UnsupportedModelError, "Linear"),
        ({"model_or_id": "/no/such/dir"}, ModelNotFoundError, "/no/such/dir"),
        ({"data": [("a text", 7)]}, EvaluationDataError, "num_labels=3"),
        ({"data": [("a text", 1)], "tokenizer": None}, EvaluationDataError, "NoneType"),
        ({"inputs": {"pixel_values": torch.zeros(1, 3, 4, 4)}}, InputError, "pixel_values"),
        ({"inputs": {"input_ids": torch.full((1, 4), 5000)}}, InputError, "original"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_quantized(
    bert: Path, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {
        "model_or_id": bert,
        "configs": [INT4],
        "tokenizer": tiny_tokenizer(),
        "progress": lambda *_: pytest.fail("something was quantized"),
        **arguments,
    }
    with pytest.raises(kind) as caught:
        hfc.compare(**given)
    assert words in str(caught.value)


def test_a_compressed_model_is_refused() -> None:
    model: PreTrainedModel = hfc.quantize(tiny("bert"), INT8)
    with pytest.raises(AlreadyQuantizedError):
        hfc.compare(model, [INT4])


# --- names -------------------------------------------------------------------------------------------------


def test_data_goes_to_those_that_need_some_and_configurations_stay_as_they_are(
    worker: CleanWorker, tmp_path: Path
) -> None:
    texts = [f"text number {index} of the words that {index * index} tests read" for index in range(64)]
    data = {"tokenizer": tiny_tokenizer(), "rows": 8, "sequence_length": 32}
    configs = {
        "shared": hfc.GPTQQuantConfig(group_size=32),
        "own": hfc.GPTQQuantConfig(group_size=32, calibration=hfc.Calibration(texts, **data, seed=7)),
        "none": INT8,
    }
    found = hfc.compare(
        tiny("llama"),
        configs,
        tokenizer=tiny_tokenizer(),
        calibration=hfc.Calibration(texts, rows=9, sequence_length=32, seed=3),
        inputs=SHORT,
        out=tmp_path / "out",
        pairs=8,
        keep_checkpoints=True,
        worker=worker,
    )
    assert list(found.reports) == list(configs)
    assert configs["shared"].calibration is None
    records = [hfc.inspect(tmp_path / "out" / "checkpoints" / name).plan.calibration for name in configs]
    assert [one and (one.rows, one.seed) for one in records] == [(9, 3), (8, 7), None]


def test_names_say_what_is_done() -> None:
    made = {
        "rtn-4bit-g64": hfc.RTNQuantConfig(),
        "rtn-8bit-channel": INT8,
        "rtn-3bit-g32-asym-emb8": hfc.RTNQuantConfig(bits=3, group_size=32, symmetric=False, embeddings="int8"),
        "rtn-4bit-tensor-skip-rules-guarded": hfc.RTNQuantConfig(
            group_size="tensor", skip=["a"], rules=[{"pattern": "b", "bits": 8}], format="guarded"
        ),
        "hqq-4bit-g64": hfc.HQQQuantConfig(bits=4, group_size=64),
        "nf4-g64": hfc.CodebookQuantConfig(codebook="nf4", group_size=64),
        "kmeans-3bit-g64": hfc.CodebookQuantConfig(codebook="kmeans", bits=3, group_size=64),
        "int8-dynamic": hfc.Int8DynamicQuantConfig(),
        "cast-fp16": hfc.CastConfig(dtype="fp16"),
        "gptq-3bit-g64-in-order": hfc.GPTQQuantConfig(bits=3, act_order=False),
        "autoround-4bit-g64-balanced": hfc.AutoRoundQuantConfig(preset="balanced"),
        "autoround-2bit-g64-7it": hfc.AutoRoundQuantConfig(bits=2, iterations=7),
        "int8-static-smooth-moving-average": hfc.Int8StaticQuantConfig(smoothing=0.5, observer="moving_average"),
        "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    assert {name: config_name(config) for name, config in made.items()} == {name: name for name in made}
    assert list(named_configs(list(made.values()))) == list(made)


def test_torchao_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    assert config_name(config) == "torchao-int8-weight-only"
    assert request_of(config)["quant_method"] == "torchao"


def test_requests_are_json_without_data() -> None:
    assert request_of(INT8)["group_size"] == "channel"
    assert request_of(BitsAndBytesConfig(load_in_8bit=True))["load_in_8bit"] is True


def test_same_names_are_told_apart() -> None:
    assert list(named_configs([INT4, INT4, INT4])) == ["rtn-4bit-g32", "rtn-4bit-g32-2", "rtn-4bit-g32-3"]
    assert unique_name("my recipe (1)", []) == "my-recipe-1"
    assert unique_name("é", ["config"]) == "config-2"
