"""The matrix of peers: what is measured again, how draws become ratios and bars, and that checkpoints are decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import hf_compress as hfc
from benchmarks.peers import dense
from benchmarks.peers.cell import GPTQMODEL, LLM_COMPRESSOR, OURS, ToolFailed, quantize
from benchmarks.peers.protocol import Job
from benchmarks.ptq_peers import BARS, DRAWS, MATRIX, chosen, key, ratio, summary
from tests._utils.tiny import tiny_dir, tiny_tokenizer


def cell(perplexity: float, seconds: float = 100.0, growth: float = 1e8, busy: bool = False) -> dict[str, Any]:
    stage = {"quantize_s": seconds, "load_s": 5.0, "cpu_s": 2 * seconds, "wall_s": seconds + 5.0, "busy": busy}
    memory = {"peak_rss_growth": growth, "peak_anonymous_growth": growth}
    return {"perplexity": perplexity, "quantize": {**stage, **memory}, "save": {"wall_s": 1.0}}


def gptq_cells() -> dict[str, Any]:
    """Ours is a percent worse than the better peer, as fast as the slower, and takes half of the leaner's memory."""
    found = {}
    for draw, base in zip(DRAWS, (30.0, 31.0, 32.0), strict=True):
        found[key(GPTQMODEL, "gptq", 4, draw)] = cell(base, 100, 1e8)
        found[key(LLM_COMPRESSOR, "gptq", 4, draw)] = cell(base + 1, 195, 2e8)
        found[key(OURS, "gptq", 4, draw)] = cell(1.01 * base, 190, 0.5e8)
    return found


def test_every_cell_is_there_once() -> None:
    keys = [one.key for one in MATRIX]
    assert len(set(keys)) == len(keys) == 31
    assert keys[-1] == "llm-compressor/awq/4/2"


def test_only_missing_failed_or_disturbed_cells_are_measured() -> None:
    cells = gptq_cells()
    cells[key(GPTQMODEL, "gptq", 4, 1)] = {"error": "no"}
    cells[key(GPTQMODEL, "gptq", 4, 2)]["quantize"]["busy"] = True
    only = ["gptqmodel/"]
    assert [one.key for one in chosen(cells, only, False, False)] == ["gptqmodel/gptq/4/1"]
    assert [one.draw for one in chosen(cells, only, True, False)] == [1, 2]
    assert [one.draw for one in chosen(cells, only, False, True)] == [0, 1, 2]


def test_bars_take_the_best_of_the_peers_each() -> None:
    table, values = summary(gptq_cells())
    found = {name.split(": ")[1].split(",")[0]: value for name, value in values.items()}
    assert found["seconds to quantize"] == pytest.approx(195 / 100)
    assert found["growth of peak resident memory"] == pytest.approx(0.5)
    assert found["perplexity over the best peer's"] == pytest.approx(1.0)  # percent; all draws alike, so no width
    assert table["gptq/4, ours / peers"]["best peer"] == "gptqmodel"
    assert {bar.name for bar in BARS if "GPTQ" in bar.name} <= set(values)


def test_a_bar_needs_all_peers() -> None:
    cells = {name: one for name, one in gptq_cells().items() if not name.startswith("llm-compressor")}
    assert summary(cells)[1] == {}


def test_interval_over_draws_is_paired() -> None:
    """By hand: logs 0.1, 0.2, 0.3 have mean 0.2 and standard error 0.1 / √3; t at two degrees of freedom is 4.3027."""
    old = {draw: cell(base) for draw, base in zip(DRAWS, (10.0, 100.0, 1000.0), strict=True)}
    logs = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).exp().tolist()
    new = {draw: cell(old[draw]["perplexity"] * log) for draw, log in zip(DRAWS, logs, strict=True)}
    found = {name: float(torch.tensor(value, dtype=torch.float64).log()) for name, value in ratio(new, old).items()}
    assert found["ratio"] == pytest.approx(0.2)
    assert found["high"] - found["ratio"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found["ratio"] - found["low"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bit_stream_gives_back_what_was_written(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    words = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        words.append([(number >> shift) & 0xFFFFFFFF for shift in range(0, bits * len(row), 32)])
    packed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(dense.bit_stream(packed, bits).long(), codes)


@pytest.mark.parametrize(("format", "bits"), [("compressed-tensors", 4), ("gptq", 4), ("gptq", 3)])
def test_decoder_agrees_with_what_was_packed(format: str, bits: int, tmp_path: Path) -> None:
    """Our own checkpoints, of layouts that other tools write too: the independent decoder gives the same values."""
    source = tiny_dir("llama", tmp_path)
    config = hfc.RTNQuantConfig(bits=bits, group_size=32, format=format)
    out = tmp_path / "out"
    hfc.save(hfc.quantize(source, config), out)
    theirs = dense.dense_model(out, source, ours=False)
    ours = dense.dense_model(out, source, ours=True)
    assert dense.quantized_linears(theirs, ours) == 0
    assert dense.quantized_linears(theirs, LlamaForCausalLM.from_pretrained(source)) == 14


def test_a_weight_that_is_missing_is_no_model(tmp_path: Path) -> None:
    source = tiny_dir("llama", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({}))
    save_file({"model.norm.weight": torch.ones(4)}, out / "model.safetensors")
    with pytest.raises(ValueError, match="weights that differ"):
        dense.dense_model(out, source, ours=False)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    source = tiny_dir("llama", tmp_path)
    tiny_tokenizer().save_pretrained(source)
    ids = torch.randint(5, 90, (16, 32), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    return Job(str(source), str(tmp_path / "ids.pt"), str(tmp_path / "out"), "gptq", 4, 32, 2, 0)


def test_a_tool_is_watched_through_both_stages(job: Job, tmp_path: Path) -> None:
    found = quantize(OURS, job, tmp_path, threads=1)
    assert set(found["versions"]) == {"transformers", "torch"}
    for stage in ("quantize", "save"):
        one = found[stage]
        assert one["wall_s"] >= one[f"{stage}_s"] > 0
        assert one["cpu_s"] > 0
        assert one["peak_rss_growth"] > -found["baseline_bytes"]["rss"]
        assert one["busy"] == (one["others_percent"] > 15)
    plan = hfc.inspect(job.out).plan
    assert plan.calibration is not None
    assert (plan.calibration.rows, plan.calibration.tokens) == (16, 16 * 32)


def test_a_tool_that_fails_says_why(job: Job, tmp_path: Path) -> None:
    broken = Job(**{**vars(job), "model": str(tmp_path / "absent")})
    with pytest.raises(ToolFailed, match="absent"):
        quantize(OURS, broken, tmp_path, threads=1)
