"""bitsandbytes and torchao under the contract: planned before loading, measured after, proven when saved."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    CorruptCheckpointError,
    CoverageError,
    NothingToQuantizeError,
    ProofError,
    UnsupportedModelError,
)
from hf_compress.evaluation.size import disk_bytes, resident_bytes
from hf_compress.modules.swap import packed_modules
from tests._utils.tiny import FAMILIES, output, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import hashes, plan_of

Make = Callable[..., Any]


def four(kind: str = "nf4", **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **options)


def eight(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def ao(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), **options)


def ao_dynamic(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), **options)


def ao_four(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4), **options)


CONFIGS: dict[str, tuple[Make, str]] = {
    "nf4": (four, "bitsandbytes nf4"),
    "fp4": (lambda **options: four("fp4", **options), "bitsandbytes fp4"),
    "nf4-double": (lambda **options: four(bnb_4bit_use_double_quant=True, **options), "bitsandbytes nf4"),
    "nf4-bf16-storage": (lambda **options: four(bnb_4bit_quant_storage="bfloat16", **options), "bitsandbytes nf4"),
    "int8": (eight, "bitsandbytes int8"),
    "ao-int8": (ao, "torchao int8"),
    "ao-dynamic": (ao_dynamic, "torchao int8-dynamic"),
    "ao-int4": (ao_four, "torchao int4"),
}

PAIRS = [
    *(("llama", name) for name in CONFIGS),
    *(("gpt2", name) for name in ("nf4", "int8")),
    *(("bert-classifier", name) for name in ("int8", "ao-dynamic")),
    *(("t5", name) for name in ("nf4", "ao-int8")),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = tiny_dir(family, tmp_path_factory.mktemp("dense"))
        return made[family]

    return find


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_planned_done_saved_and_loaded(
    family: str, name: str, dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    make, label = CONFIGS[name]
    config, path = make(), dense(family)
    asked = deepcopy(config.to_dict())
    planned = hfc.plan(path, config, min_coverage=0.8)

    model = hfc.quantize(path, config, min_coverage=0.8)

    assert config.to_dict() == asked
    assert plan_of(model) == planned
    assert planned.method == planned.format == label.partition(" ")[0]
    assert {row.backend for row in planned.rows if row.covered} == {label}
    inputs = tiny_inputs(model)
    before = resident_bytes(model)
    proof = hfc.save(model, tmp_path / "out", worker=worker)
    assert proof.level == "full"
    assert max(check.relative for check in proof.checks) == 0.0
    assert proof.resident_bytes is not None
    assert abs(proof.resident_bytes[0] - before) <= 0.05 * before

    expected, loaded = output(model, inputs), hfc.load(tmp_path / "out")
    assert torch.equal(output(loaded, inputs), expected)
    assert [row.backend for row in plan_of(loaded).rows] == [row.backend for row in planned.rows]
    assert hfc.inspect(tmp_path / "out").coverage == planned.coverage
    stock = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(stock, inputs), expected)

    for again in (loaded, stock):
        assert hfc.save(again, tmp_path / "again", overwrite=True, worker=worker).level == "full"
        assert hfc.verify(tmp_path / "again", worker=worker).level == "full"
        assert torch.equal(output(hfc.load(tmp_path / "again"), inputs), expected)


def test_what_our_own_writer_wrote_and_stock_loaded_saves(
    dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    model = hfc.quantize(dense("llama"), hfc.CodebookQuantConfig(format="bitsandbytes"))
    hfc.save(model, tmp_path / "ours", worker=worker)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = output(loaded, tiny_inputs(loaded))

    assert hfc.save(loaded, tmp_path / "out", worker=worker).level == "full"

    assert hfc.verify(tmp_path / "out", worker=worker).level == "full"
    assert torch.equal(output(hfc.load(tmp_path / "out"), tiny_inputs(loaded)), expected)


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "nf4-bf16-storage", "int8", "ao-int8"])
def test_a_model_that_has_run_saves_and_goes_on(
    name: str, dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first forward, and its own
    `state_dict` undoes that with transposed scales."""
    model = hfc.quantize(dense("llama"), CONFIGS[name][0]()).eval()
    inputs = tiny_inputs(model)
    expected = output(model, inputs)

    hfc.save(model, tmp_path / "out", worker=worker)

    assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(hfc.load(tmp_path / "out"), inputs), expected)
    hfc.save(model, tmp_path / "again", worker=worker)
    assert hashes(tmp_path / "again", "*.safetensors") == hashes(tmp_path / "out", "*.safetensors")
    verified = hfc.verify(tmp_path / "out", worker=worker)
    assert verified.level == "full"


@pytest.mark.parametrize("name", ["nf4", "ao-dynamic"])
def test_same_bytes_every_time(name: str, dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker) -> None:
    for out in ("first", "second"):
        hfc.save(hfc.quantize(dense("llama"), CONFIGS[name][0]()), tmp_path / out, worker=worker)
    assert hashes(tmp_path / "first", "*.safetensors") == hashes(tmp_path / "second", "*.safetensors")


@pytest.mark.parametrize("name", ["ao-int8", "ao-dynamic", "ao-int4"])
def test_gpt2_by_torchao_is_refused_before_loading(name: str, dense: Callable[[str], Path]) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"0 of 11 .*torchao does not handle Conv1D.*RTNQuantConfig"):
        hfc.quantize(dense("gpt2"), CONFIGS[name][0]())


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8"])
def test_fused_experts_are_refused_with_the_measured_coverage(name: str, dense: Callable[[str], Path]) -> None:
    path, config = dense("qwen3-moe"), CONFIGS[name][0]()
    model = tiny("qwen3-moe")
    in_scope = {key: value.numel() for key, value in model.named_parameters() if ".layers." in key and value.ndim > 1}
    routers = [key for key in in_scope if key.endswith("mlp.gate.weight")]
    done = sum(count for key, count in in_scope.items() if "self_attn" in key)
    share = done / sum(in_scope.values())
    assert routers

    with pytest.raises(CoverageError, match=rf"Only {share:.1%} .*skips fused experts.*RTNQuantConfig"):
        hfc.quantize(path, config)

    accepted = int(100 * share) / 100
    model = hfc.quantize(path, config, min_coverage=accepted)
    assert hfc.inspect(model).coverage == pytest.approx(share)
    with pytest.raises(CoverageError):
        hfc.quantize(path, config, min_coverage=accepted + 0.01)


def test_real_shapes_of_qwen3_moe(tmp_path: Path) -> None:
    """Qwen3-30B-A3B with two of its layers: the shapes decide the percentage."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    config = transformers.Qwen3MoeConfig(**sizes, num_hidden_layers=2, architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(tmp_path)
    attention = 2048 * 4096 * 2 + 2048 * 512 * 2
    experts = 128 * 3 * 2048 * 768
    share = attention / (attention + experts + 128 * 2048)
    with pytest.raises(CoverageError, match=f"Only {share:.1%}"):
        hfc.plan(tmp_path, four())


def test_double_quantization_of_a_rounded_model_takes_what_was_planned(dense: Callable[[str], Path]) -> None:
    plain = {row.name: row.stored_bytes for row in hfc.plan(dense("llama"), four()).rows if row.covered}
    model = hfc.quantize(dense("llama"), four(bnb_4bit_use_double_quant=True))
    for row in plan_of(model).rows:
        if row.covered:
            blocks = row.parameters // 64
            extra = 4 * -(-blocks // 256) + 4 + 4 * 256 - 3 * blocks
            assert row.stored_bytes == (plain[row.name] or 0) + extra


def test_resident_bytes_say_what_get_memory_footprint_does_not(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 256}
    path = tiny_dir("llama", tmp_path, dtype=torch.bfloat16, **sizes)
    original = tiny("llama", dtype=torch.bfloat16, **sizes)
    rounded = hfc.quantize(path, ao())
    assert rounded.get_memory_footprint() >= 0.99 * original.get_memory_footprint()
    assert resident_bytes(rounded) < 0.6 * resident_bytes(original)

    packed = hfc.quantize(path, four())
    rows = [row for row in plan_of(packed).rows if row.covered]
    bits = 8 * sum(row.stored_bytes or 0 for row in rows) / sum(row.parameters for row in rows)
    assert 4.5 <= bits < 4.51
    kept = sum(row.dense_bytes for row in plan_of(packed).rows if not row.covered)
    assert resident_bytes(packed) >= kept + sum(row.stored_bytes or 0 for row in rows)

    eight_bit = hfc.quantize(path, eight())
    before = resident_bytes(eight_bit)
    output(eight_bit, tiny_inputs(eight_bit))
    assert resident_bytes(eight_bit) == before
    rows = [row for row in plan_of(eight_bit).rows if row.covered]
    assert sum(row.stored_bytes or 0 for row in rows) == sum(row.parameters + 4 * row.shape[0] for row in rows)


def test_preflight_says_what_it_will_take(dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker) -> None:
    for make, _ in CONFIGS.values():
        forecast, model = hfc.preflight(dense("llama"), make()), hfc.quantize(dense("llama"), make())
        buffers = sum(value.numel() * value.element_size() for value in model.buffers())
        assert forecast.bytes_after == resident_bytes(model) - buffers
        assert forecast.plan == plan_of(model)
    hfc.save(model, tmp_path / "out", worker=worker)
    assert disk_bytes(tmp_path / "out").weights == pytest.approx(forecast.bytes_after, rel=0.25)


def stock(family: str, path: Path, config: Any) -> PreTrainedModel:
    kind = getattr(transformers, FAMILIES[family][0])
    model: PreTrainedModel = kind.from_pretrained(path, quantization_config=config)
    return model.eval()


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8"])
def test_a_model_that_stock_loaded(
    name: str, dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    make, label = CONFIGS[name]
    model = stock("llama", dense("llama"), make())

    seen = hfc.inspect(model)

    assert seen.coverage == 1.0
    assert seen.kernels == {label.partition(" ")[0]: 14}
    assert seen.by_scheme == hfc.plan(dense("llama"), make()).by_scheme()
    assert seen.resident_bytes == resident_bytes(model)
    proof = hfc.save(model, tmp_path / "out", worker=worker)
    assert proof.level == "full"
    assert hfc.inspect(hfc.load(tmp_path / "out")).by_scheme == seen.by_scheme


def test_stock_skips_silently_and_inspect_says_so(dense: Callable[[str], Path]) -> None:
    gpt2 = hfc.inspect(stock("gpt2", dense("gpt2"), ao()))
    assert gpt2.coverage == 0.0
    assert set(gpt2.by_scheme) == {"kept"}
    moe = hfc.inspect(stock("qwen3-moe", dense("qwen3-moe"), four()))
    assert moe.coverage is not None
    assert 0 < moe.coverage < 0.12


def test_inspect_of_a_dense_model(dense: Callable[[str], Path]) -> None:
    seen = hfc.inspect(tiny("bert"))
    assert seen.coverage == 0.0
    assert set(seen.by_scheme) == {"kept"}
    assert seen.notes == ("not quantized",)


def test_inspect_of_compressed_tensors_in_stock(tmp_path: Path, worker: CleanWorker) -> None:
    hfc.save(hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=4)), tmp_path / "out", worker=worker)
    kind = transformers.LlamaForCausalLM
    model = kind.from_pretrained(tmp_path / "out").eval()
    ours = hfc.inspect(tmp_path / "out")

    packed = hfc.inspect(model)
    assert packed.coverage == 1.0
    assert packed.by_scheme == ours.by_scheme
    assert packed.resident_bytes is not None
    output(model, tiny_inputs(model))
    dense_now = hfc.inspect(model)

    assert dense_now.by_scheme == ours.by_scheme
    assert dense_now.resident_bytes is not None
    assert dense_now.resident_bytes > 2 * packed.resident_bytes
    assert any("optimize_for_inference" in note for note in dense_now.notes)


@pytest.mark.parametrize("name", ["nf4", "ao-int8"])
def test_evaluate(name: str, dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker) -> None:
    model, library = hfc.quantize(dense("llama"), CONFIGS[name][0]()), CONFIGS[name][1].partition(" ")[0]
    hfc.save(model, tmp_path / "out", worker=worker)
    report = hfc.evaluate(model, tiny("llama"), path=tmp_path / "out", pairs=8, inputs=tiny_inputs(model))
    assert report.kernels == {library: 14}
    assert report.method == report.format == library
    assert report.size.resident < report.size.baseline_resident
    assert report.coverage.fraction == 1.0
    with pytest.raises(UnsupportedModelError, match="differ"):
        hfc.evaluate(model, tiny("llama", intermediate_size=192), pairs=8)
    with pytest.raises(UnsupportedModelError, match="baseline"):
        hfc.evaluate(model, stock("llama", dense("llama"), CONFIGS[name][0]()), pairs=8)


def test_a_layer_that_was_replaced_is_noticed(dense: Callable[[str], Path], tmp_path: Path) -> None:
    model = hfc.quantize(dense("llama"), ao())
    with torch.random.fork_rng(devices=[]):
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj .* is dense.*torchao int8"):
        hfc.save(model, tmp_path / "out")


def test_a_checkpoint_that_is_something_else_is_corrupt(
    dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    hfc.save(hfc.quantize(dense("llama"), ao()), tmp_path / "out", worker=worker)
    record = (tmp_path / "out" / "hf_compress.json").read_text()
    stock("llama", dense("llama"), ao_dynamic()).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "hf_compress.json").write_text(record)
    with pytest.raises(CorruptCheckpointError, match="int8-dynamic"):
        hfc.load(tmp_path / "out")


def test_a_model_that_does_not_fit_twice_is_not_saved(
    dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    model = hfc.quantize(dense("llama"), four())
    needed = int(resident_bytes(model) * 1.3)
    with pytest.raises(ProofError, match=f"needs {needed} bytes; {needed - 1} are free"):
        hfc.save(model, tmp_path / "out", worker=worker, free_bytes=needed - 1)
    assert not list(tmp_path.iterdir())
    hfc.save(model, tmp_path / "out", worker=worker, free_bytes=needed)


def test_without_the_library_in_the_clean_process_our_reader_proves(
    dense: Callable[[str], Path], tmp_path: Path, worker: CleanWorker
) -> None:
    model = hfc.quantize(dense("llama"), four()).eval()
    expected = output(model, tiny_inputs(model))
    with CleanWorker(blocked=["bitsandbytes"]) as blind:
        proof = hfc.save(model, tmp_path / "out", worker=blind)
    assert proof.level == "own-reader"
    assert "'bitsandbytes' is not installed" in proof.reason
    assert torch.equal(output(model, tiny_inputs(model)), expected)
    assert hfc.verify(tmp_path / "out", worker=worker).level == "full"


def test_a_dequantized_model_is_dense_again(dense: Callable[[str], Path]) -> None:
    model = hfc.quantize(dense("llama"), four()).dequantize()
    seen = hfc.inspect(model)
    assert seen.coverage == 0.0
    assert seen.kernels == {}
    assert hfc.inspect(hfc.quantize(model, hfc.RTNQuantConfig())).coverage == 1.0


def test_nothing_of_ours_is_packed(dense: Callable[[str], Path]) -> None:
    assert not list(packed_modules(hfc.quantize(dense("llama"), four())))
