"""The report: honest first line, real bytes, one versioned file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.record import FILE, Check, Proof, record_of
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EvaluationDataError,
    InputError,
    MeasurementError,
    UnsupportedModelError,
    WriteError,
)
from hf_compress.evaluation.quality import (
    CausalLMQuality,
    ClassificationQuality,
    EmbeddingQuality,
    QualityResult,
)
from hf_compress.evaluation.report import (
    Layer,
    Report,
    evaluate,
    headline,
    read_report,
    to_markdown,
    write_report,
)
from hf_compress.evaluation.report_inputs import latency_inputs, runner
from hf_compress.modules.swap import packed_modules, packed_tensor
from tests._utils.tiny import tiny, tiny_tokenizer

SLOWER = "SLOWER THAN THE ORIGINAL"
INPUTS = {"input_ids": torch.arange(12).view(2, 6) + 5}


class Clock:
    """Stands still but for the seconds that each model's forward is said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def charge(self, model: nn.Module, seconds: Callable[[torch.Tensor], float]) -> None:
        def advance(_: nn.Module, __: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.now += seconds(keywords["input_ids"])

        model.register_forward_pre_hook(advance, with_kwargs=True)


def pair(family: str = "llama", config: Any = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A compressed model and its original."""
    baseline = tiny(family, num_hidden_layers=1)
    return hfc.quantize(copy.deepcopy(baseline), config or hfc.RTNQuantConfig(bits=4, group_size=32)), baseline


def timed(seconds: Callable[[torch.Tensor], float] | float, **arguments: Any) -> Report:
    """The report when the original takes a second per forward and the compressed model `seconds`."""
    model, baseline = pair()
    clock = Clock()
    clock.charge(baseline, lambda _: 1.0)
    clock.charge(model, seconds if callable(seconds) else lambda _: seconds)
    return evaluate(model, baseline, pairs=8, clock=clock, **{"inputs": INPUTS, **arguments})


@pytest.fixture(scope="module")
def report() -> Report:
    return timed(1.0)


# --- the first line ----------------------------------------------------------------------------------------


def test_slower_is_the_first_thing_said() -> None:
    made = timed(2.5)
    first, rest = to_markdown(made).split("\n", 1)
    assert first.startswith(f"{SLOWER}: takes 2.50 times as long")
    assert first.endswith("on input_ids 2×6.")
    assert " times smaller in memory; SLOWER than the original" in rest
    assert json.loads(made.model_dump_json())["latency"]["input_ids 2×6"]["verdict"] == "slower"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.0, "no difference in speed beyond 5 % proven (1.00 times on input_ids 2×6"), (1.04, "no difference"),
     (0.5, "faster than the original (2.00 times its speed on input_ids 2×6)")],
)  # fmt: skip
def test_not_slower_is_not_called_slower(seconds: float, words: str) -> None:
    page = to_markdown(timed(seconds))
    assert SLOWER not in page
    assert words in page.split("\n", 1)[0]


def test_slower_on_one_input_counts() -> None:
    made = timed(lambda ids: 4.0 if ids.shape == (2, 16) else 0.5, inputs=None)
    assert {name: one.verdict for name, one in (made.latency or {}).items()} == {
        "input_ids 2×16": "slower",
        "input_ids 1×62": "faster",
    }
    page = to_markdown(made).split("\n")
    assert page[0].startswith(f"{SLOWER}: takes 4.00 times as long")
    assert any("faster than the original (2.00 times its speed on input_ids 1×62)" in line for line in page[1:])


def test_larger_is_not_called_smaller(report: Report) -> None:
    size = report.size.model_copy(update={"resident": 2 * report.size.baseline_resident})
    assert headline(report.model_copy(update={"size": size})).startswith("2.00 times LARGER in memory")


# --- numbers -----------------------------------------------------------------------------------------------


def storages(model: nn.Module) -> int:
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def payload(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_sizes_are_the_files_and_the_storages(family: str, tmp_path: Path) -> None:
    model, baseline = pair(family)
    model.save_pretrained(tmp_path / "packed")
    baseline.save_pretrained(tmp_path / "dense")
    size = evaluate(model, baseline, path=tmp_path / "packed", inputs=INPUTS, pairs=8).size
    files = [file for file in (tmp_path / "packed").rglob("*") if file.is_file()]
    assert size.disk is not None
    assert size.disk.total == sum(file.stat().st_size for file in files)
    assert size.disk.weights == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert size.baseline_disk_weights == payload(tmp_path / "dense" / "model.safetensors")
    assert (size.resident, size.baseline_resident) == (storages(model), storages(baseline))
    assert size.disk_ratio == size.baseline_disk_weights / size.disk.weights
    assert size.resident < payload(tmp_path / "packed" / "model.safetensors") * 1.01


def test_tied_weights_count_once() -> None:
    model, baseline = pair("llama-tied")
    made = evaluate(model, baseline, inputs=INPUTS, pairs=8)
    table = baseline.get_input_embeddings().weight
    assert made.size.baseline_disk_weights == sum(value.nbytes for value in baseline.parameters())
    assert sum(weight.parameters for weight in made.coverage.kept) == table.numel()
    assert [weight.parameters for weight in made.coverage.kept] == [table.numel(), 0]


def test_coverage_layers_and_kernels_follow_the_plan(report: Report) -> None:
    assert report.coverage.fraction == 1
    assert report.coverage.of_all == pytest.approx(36864 / (36864 + 16384))
    assert "69.2 % of all weights' values" in to_markdown(report)
    assert {name: count.weights for name, count in report.coverage.by_scheme.items()} == {"int4-g32": 7, "kept": 2}
    assert [weight.reason for weight in report.coverage.kept] == ["default rule: embedding", "default rule: head"]
    assert len(report.layers) == 7
    assert all(layer.sqnr_db is not None and 15 < layer.sqnr_db < 30 for layer in report.layers)
    assert report.kernels == {"reference": 7}
    assert (report.method, report.format, report.request["group_size"]) == ("rtn", "compressed-tensors", 32)


def test_worst_layers_are_shown(report: Report) -> None:
    noise = [30.0, -math.inf, None, *(float(value) for value in range(40, 50))]
    layers = tuple(Layer(name=f"n{index}", scheme="a|b", sqnr_db=value) for index, value in enumerate(noise))
    made = report.model_copy(update={"layers": layers})
    lines = [line for line in to_markdown(made).split("\n") if line.startswith("| n")]
    assert [line.split(" | ")[0] for line in lines] == ["| n1", "| n0", *(f"| n{index}" for index in range(3, 11))]
    assert lines[0] == "| n1 | a\\|b | -inf |"
    assert Report.model_validate_json(made.model_dump_json()) == made


def test_cast_has_coverage_and_no_kernels() -> None:
    made = evaluate(*pair(config=hfc.CastConfig()), inputs=INPUTS, pairs=8)
    assert made.format == "dense"
    assert made.kernels == {}
    assert made.size.resident_ratio == pytest.approx(2, abs=0.01)
    assert "torch's own kernels run" in to_markdown(made)


@pytest.mark.slow  # starts a clean process
def test_proven_checkpoint(tmp_path: Path, worker: CleanWorker) -> None:
    model, baseline = pair()
    torch.set_num_threads(worker.threads or 1)  # equal outputs need equal threads
    proof = hfc.save(model, tmp_path / "out", worker=worker)
    torch.set_num_threads(1)
    made = evaluate(model, baseline, path=tmp_path / "out", inputs=INPUTS, pairs=8)
    assert made.proof == proof
    assert (made.size.stock_resident_before, made.size.stock_resident_after) == proof.resident_bytes
    page = to_markdown(made)
    assert "Level: full." in page
    assert "stock transformers, after its first forward" in page
    assert " times smaller on disk" in page


def test_proof_is_what_the_record_says(tmp_path: Path) -> None:
    model, baseline = pair()
    model.save_pretrained(tmp_path)
    plan = plan_of(model)
    assert plan is not None
    check = Check(name="row", difference=0.5, relative=0.25, limit=1.0)
    proof = Proof(level="truncated", reason="Too big.", checks=(check,), resident_bytes=(11, 22))
    record = record_of(model, plan).model_copy(update={"proof": proof})
    (tmp_path / FILE).write_text(record.model_dump_json())
    made = evaluate(model, baseline, path=tmp_path, inputs=INPUTS, pairs=8)
    assert (made.size.stock_resident_before, made.size.stock_resident_after) == (11, 22)
    page = to_markdown(made)
    assert "Level: truncated. Too big.\n\n| check" in page
    assert "| row | 0.5 | 0.25 | 1 |" in page


# --- quality -----------------------------------------------------------------------------------------------


def test_quality_is_measured_on_data() -> None:
    model, baseline = pair("bert-classifier")
    data = [("good day", 0), ("bad night, and long", 1), ("so so", 2)]
    made = evaluate(model, baseline, data, tokenizer=tiny_tokenizer(), pairs=8, max_length=12)
    assert made.quality is not None
    assert isinstance(made.quality.result, ClassificationQuality)
    assert (made.quality.result.examples, made.quality.truncated) == (3, 1)
    assert "Texts cut at 12 tokens: 1." in made.notes
    assert "accuracy" in to_markdown(made)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            ClassificationQuality(examples=100, baseline_accuracy=0.9, candidate_accuracy=0.88, difference=-0.02,
                difference_low=-0.06, difference_high=0.02, lost=3, gained=1, agreement=0.95),
            "accuracy 0.900 → 0.880 (95 % interval of the difference -0.060 to +0.020)",
        ),
        (
            CausalLMQuality(windows=9, tokens=99, baseline_perplexity=20, candidate_perplexity=21, ratio=1.05,
                ratio_low=1.02, ratio_high=1.08, kl=0.04, agreement=0.9),
            "perplexity 20 → 21, × 1.050 (95 % interval 1.020 to 1.080)",
        ),
        (
            EmbeddingQuality(texts=9, mean=0.99, mean_low=0.98, mean_high=1.0, min=0.9, p5=0.95),
            "cosine with the original 0.9900 (95 % interval 0.9800 to 1.0000)",
        ),
    ],
)  # fmt: skip
def test_quality_has_its_interval_in_the_first_line(report: Report, result: Any, words: str) -> None:
    made = report.model_copy(update={"quality": QualityResult(task=result.kind, result=result, max_length=None)})
    page = to_markdown(made)
    assert words in page.split("\n", 1)[0]
    assert "95 % interval |" in page
    assert Report.model_validate_json(made.model_dump_json()) == made


# --- refusals ----------------------------------------------------------------------------------------------


def test_models_that_are_no_pair(tmp_path: Path) -> None:
    model, baseline = pair()
    other, _ = pair(config=hfc.RTNQuantConfig(bits=8, group_size=32))
    other.save_pretrained(tmp_path)
    plain = nn.Linear(2, 2)
    for candidate, original, message in (
        (baseline, model, "was not compressed by hf_compress"),
        (plain, plain, "Linear was not compressed"),
        (model, model, "compressed too"),
        (model, tiny("bert"), "a LlamaForCausalLM and its baseline a BertModel"),
        (model, copy.deepcopy(baseline).to("meta"), "meta device"),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            evaluate(candidate, original, inputs=INPUTS, pairs=8)
        assert caught.value.fix
    with pytest.raises(UnsupportedModelError, match=r"another compression .* differ at"):
        evaluate(model, baseline, path=tmp_path, inputs=INPUTS, pairs=8)
    with pytest.raises(CheckpointNotFoundError):
        evaluate(model, baseline, path=tmp_path / "nowhere", inputs=INPUTS, pairs=8)
    with pytest.raises(InputError):
        evaluate(model, baseline, inputs={"no_such_argument": torch.ones(1)}, pairs=8)
    with pytest.raises(MeasurementError, match="pairs=2"):
        evaluate(model, baseline, inputs=INPUTS, pairs=2)
    with pytest.raises(EvaluationDataError, match="tokenizer is a NoneType"):
        evaluate(model, baseline, ["a", "b"], inputs=INPUTS, pairs=8)


def test_baseline_of_another_size() -> None:
    model, baseline = pair()
    data = {"data": ["a", "b"], "tokenizer": tiny_tokenizer()}
    for other, message in (
        (tiny("llama"), "differ in num_hidden_layers 1 and 2"),
        (tiny("llama", num_hidden_layers=1, intermediate_size=96), r"intermediate_size 128 and 96, .*_proj"),
        (tiny("llama", num_hidden_layers=1, vocab_size=130), "vocab_size 128 and 130"),
        (tiny("llama", num_hidden_layers=1, num_key_value_heads=4), r"k_proj.weight \(32, 64\) and \(64, 64\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            evaluate(model, other, inputs=INPUTS, pairs=8, clock=untouched, **data)
        assert caught.value.fix
    for sides in ((None, baseline), ("path", baseline), (model, None), (model, type(model))):
        with pytest.raises(UnsupportedModelError, match="and no module"):
            evaluate(*sides, inputs=INPUTS, pairs=8)


def untouched(*_: Any, **__: Any) -> float:
    pytest.fail("something ran before all was checked")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": []}, EvaluationDataError),
        ({"data": 3}, EvaluationDataError),
        ({"data": [("a", 0), ("b", 7)]}, EvaluationDataError),
        ({"data": [("a", 0)], "tokenizer": None}, EvaluationDataError),
        ({"data": ["a"], "task": "embedding"}, EvaluationDataError),
        ({"data": ["a"], "task": "causal-lm"}, EvaluationDataError),
        ({"data": [("a", 0)], "max_length": 65}, EvaluationDataError),
        ({"task": "clasification"}, EvaluationDataError),
        ({"batch_size": "8"}, EvaluationDataError),
        ({"max_length": "9"}, EvaluationDataError),
        ({"pairs": "many"}, MeasurementError),
        ({"pairs": 7}, MeasurementError),
        ({"inputs": {"input_ids": 3}}, InputError),
        ({"path": "nowhere"}, CheckpointNotFoundError),
    ],
)
def test_arguments_are_checked_before_any_forward(
    arguments: dict[str, Any], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, baseline = pair("bert-classifier")
    for side in (model, baseline):
        side.register_forward_pre_hook(untouched)
    with pytest.raises(error):
        evaluate(model, baseline, **{"tokenizer": tiny_tokenizer(), "inputs": INPUTS, "clock": untouched, **arguments})


def test_inputs_that_the_model_cannot_run() -> None:
    model, baseline = pair()
    for ids in (torch.full((1, 4), 10**6), torch.ones(1, 4)):
        with pytest.raises(
            InputError, match=r"The model, a LlamaForCausalLM, can't run the inputs input_ids 1×4: "
        ) as caught:
            evaluate(model, baseline, inputs={"input_ids": ids}, pairs=8, clock=untouched)
        assert caught.value.fix
    assert not any(module.training for module in model.modules())


class Spy:
    """A kernel that counts its calls, and leaves the work to the module's own class."""

    name, tolerance = "spy", 0.0

    def __init__(self) -> None:
        self.calls = 0

    def run(self, module: nn.Module, value: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.linear(value, packed_tensor(module, "weight").dense())


def test_kernels_are_those_that_run() -> None:
    model, baseline = pair(config=hfc.Int8DynamicQuantConfig())
    spy = Spy()
    modules = [module for _, module in packed_modules(model)]
    for module in modules:
        module.hfc_kernel = spy  # type: ignore[assignment]
    assert evaluate(model, baseline, inputs=INPUTS, pairs=8).kernels == {"spy": len(modules)}
    assert spy.calls
    spy.calls = 0
    both = [side.to(torch.bfloat16) for side in (model, baseline)]
    assert evaluate(*both, inputs=INPUTS, pairs=8).kernels == {"reference": len(modules)}
    assert not spy.calls


def test_training_flags_come_back() -> None:
    model, baseline = pair()
    baseline.train()
    evaluate(model, baseline, inputs=INPUTS, pairs=8)
    assert all(module.training for module in baseline.modules())
    assert not any(module.training for module in model.modules())


# --- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["input_ids 2×16", "input_ids 1×62"]),
        ("t5", ["input_ids 2×16, decoder_input_ids 2×16", "input_ids 1×128, decoder_input_ids 1×16"]),
        ("vit", ["pixel_values 2×3×16×16"]),
    ],
)
def test_latency_inputs_run(family: str, names: list[str]) -> None:
    model = tiny(family)
    made = latency_inputs(model)
    assert list(made) == names
    with torch.inference_mode():
        for one in made.values():
            runner(model, one)()


def test_given_inputs_all_count() -> None:
    made = latency_inputs(tiny("llama"), [INPUTS, INPUTS, {"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    assert list(made) == ["input_ids 2×6", "input_ids 2×6 (2)", "input_ids 1×3"]
    with pytest.raises(InputError, match="no transformers model"):
        latency_inputs(nn.Linear(2, 2))


# --- files -------------------------------------------------------------------------------------------------


def test_files_round_trip(report: Report, tmp_path: Path) -> None:
    for made in (report, report.model_copy(update={"model": "some/model"})):
        data, page = write_report(made, tmp_path / "deep" / "down")
        assert read_report(data) == read_report(data.parent) == made
        assert page.read_text(encoding="utf-8") == to_markdown(made)
    assert sorted(file.name for file in data.parent.iterdir()) == ["report.json", "report.md"]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        write_report(report, tmp_path / "file" / "below")


def test_reports_that_can_not_be_read(report: Report, tmp_path: Path) -> None:
    values = report.model_dump(mode="json")
    file = tmp_path / "report.json"
    with pytest.raises(CheckpointNotFoundError, match="no report at"):
        read_report(tmp_path)
    for text, message in (
        (json.dumps({**values, "schema_version": 2, "new": 1}), "schema_version 2; hf_compress .* reads 1"),
        (json.dumps({**values, "new": 1}), "doesn't fit at new"),
        (json.dumps({**values, "size": {}}), "doesn't fit at size"),
        (json.dumps([1]), "is no report"),
        (report.model_dump_json()[:-9], "not whole JSON"),
        ("\udcff", "not whole JSON"),
    ):
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(CorruptCheckpointError, match=message) as caught:
            read_report(file)
        assert caught.value.fix


def test_how_to_reproduce(report: Report) -> None:
    named = report.model_copy(update={"model": "some/model"})
    assert 'source = "some/model"' in to_markdown(named)
    assert "hfc.RTNQuantConfig(group_size=32))" in to_markdown(named)
    unknown = report.model_copy(update={"method": "of-a-later-version"})
    assert "hfc.QuantConfig.from_dict({'method': 'of-a-later-version'" in to_markdown(unknown)
    assert "{{" not in to_markdown(unknown)
