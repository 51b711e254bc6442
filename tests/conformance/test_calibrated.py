"""Calibrated methods on every kind of architecture: saved, proven by a stock reload, and better than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.inputs import example_inputs
from hf_compress.checkpoint.proof_worker import run_inputs
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.config import QuantConfig
from hf_compress.modules.kernels.choose import reference_kernels
from tests._utils.tiny import tiny, tiny_dir
from tests.conformance.helpers import relative

FAMILIES = ("bert", "bert-classifier", "t5", "bart", "vit", "whisper", "gpt2", "llama-tied", "opt", "qwen3-moe")
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "autoround": {"bits": 4, "group_size": 32, "iterations": 8},
}
METHODS = {**WEIGHT_ONLY, "int8_static": {}}


def config(method: str, model: PreTrainedModel, **fields: Any) -> QuantConfig:
    """A request with enough rows of the model's own example inputs."""
    batches = [batch for seed in range(4) for batch in example_inputs(model, seed)]
    calibration = hfc.Calibration(batches, min_rows=1, min_tokens=1)
    made: QuantConfig = QuantConfig.from_dict({"method": method, **METHODS[method], **fields})
    made.calibration = calibration
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_saved_proven_and_loaded(method: str, family: str, tmp_path: Path, worker: CleanWorker) -> None:
    model = tiny(family)
    made = hfc.quantize(model, config(method, model))
    plan = plan_of(made)
    assert plan is not None
    assert plan.coverage >= 0.9
    assert plan.calibration is not None
    assert plan.calibration.rows == 16
    proof = hfc.save(made, tmp_path / "out", worker=worker)
    assert proof.level == "full"
    loaded, inputs = hfc.load(tmp_path / "out"), example_inputs(made, 99)
    with reference_kernels(made), reference_kernels(loaded):
        expected, found = run_inputs(made.eval(), inputs), run_inputs(loaded, inputs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_outputs_are_closer_than_those_of_rounding(method: str, family: str) -> None:
    dense = tiny(family)
    request = config(method, dense)
    fields = {"bits": 4, "group_size": 32, "format": "guarded"}
    inputs = [batch for seed in range(4) for batch in example_inputs(dense, seed)]
    expected = run_inputs(dense, inputs)

    def error(model: PreTrainedModel) -> float:
        found = run_inputs(model.eval(), inputs)
        return sum(relative(found[name], expected[name]) for name in expected)

    ours = error(hfc.quantize(tiny(family), request))
    rounded = error(hfc.quantize(tiny(family), hfc.RTNQuantConfig(**fields)))
    assert ours < rounded


@pytest.mark.parametrize("method", METHODS)
def test_from_pretrained_gives_the_same_as_a_live_model(method: str, tmp_path: Path) -> None:
    path = tiny_dir("llama-tied", tmp_path / "dense")
    live = tiny("llama-tied")
    request = config(method, live)
    loaded = type(live).from_pretrained(path, quantization_config=request)
    streamed = hfc.quantize(path, request)
    hfc.quantize(live, request)
    for other in (loaded, streamed):
        state = other.state_dict()
        assert {key for key, value in live.state_dict().items() if not torch.equal(value, state[key])} == set()
        assert plan_of(other) == plan_of(live)
