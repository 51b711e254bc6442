"""Merging adapters into compressed models: measured against an oracle, refused where it would lose them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import BackendError, CalibrationError, ConfigError, MergeError, UnsupportedModelError
from hf_compress.modules.packed import to_words, unpack_codes
from hf_compress.modules.swap import PackedModule, packed_tensor
from hf_compress.training.lora import MergeReport, merge_adapter, merge_report
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import plan_of, reference_logits, relative, same_states

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.touches_rng,  # adapters draw when they are made
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]

SMALL, LARGE = 0.001, 0.3
"""Of an adapter's B; a step of the 4-bit grids here is worth about 0.05."""

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "llama-tied": ["q_proj"],
    "gpt2": ["c_attn"],
    "bert-classifier": ["query", "value"],
}


def int4() -> Any:
    return hfc.RTNQuantConfig(bits=4, group_size=32)


def packed(family: str = "llama", config: Any = None) -> PreTrainedModel:
    return hfc.quantize(tiny(family), config or int4()).eval()


def adapted(model: nn.Module, size: float, name: str = "default", seed: int = 1, **options: Any) -> Any:
    """A model with an adapter whose B is normal with a given standard deviation."""
    family = {"llama": "llama", "gpt2": "gpt2", "bert": "bert-classifier"}[model.config.model_type]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS[family], **options})
    torch.manual_seed(seed)
    made = peft.get_peft_model(model, config, adapter_name=name)
    return filled(made, size, name, seed)


def filled(model: Any, size: float, name: str = "default", seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if name in key.split(".") and ("lora_B" in key or "lora_embedding_B" in key):
            value.data = (size * torch.randn(value.shape, generator=generator)).to(value.dtype)
    return model.eval()


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    base = model.get_base_model()
    return ((path, one) for path, one in base.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def oracle(layer: Any, inputs: Tensor | None = None) -> tuple[float, float]:
    """Error and effect of merging into a symmetric group-wise layer, in float64, group by group."""
    base, name = layer.get_base_layer(), "default"
    held = packed_tensor(base, "weight")
    before = held.dense().double()
    change = layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
    merged = before + change
    bits, size = held.layout.weights.num_bits, held.layout.weights.group_size
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Codes are chosen in float32, as they are stored: the largest value of a group is 7.5 steps, a tie that another
    # last bit would send to the other side.
    stored = held.dense() + layer.get_delta_weight(name)
    new, same = torch.empty_like(merged), torch.empty_like(merged)
    for row in range(len(stored)):
        for group in range(stored.shape[1] // size):
            part = slice(group * size, (group + 1) * size)
            fresh = stored[row, part].abs().max() / ((high - low) / 2)
            for made, scale in ((new, fresh), (same, held.scale[row, group])):
                made[row, part] = ((stored[row, part] / scale).round().clamp(low, high) * scale).double()
    across = torch.eye(merged.shape[1], dtype=torch.float64) if inputs is None else inputs.double()
    errors = [float(torch.linalg.norm(across @ (made - merged).T)) for made in (new, same)]
    return min(errors), float(torch.linalg.norm(across @ change.T))


def test_figures_equal_an_oracle_on_weights() -> None:
    """Within 1e-4: products and sums of up to 128 float32 values, and scales rounded to float32."""
    model = adapted(packed(), LARGE)
    report = merge_report(model)
    assert report.measured == "weights"
    assert report.adapters == ("default",)
    assert [one.name for one in report.layers] == [path for path, _ in layers_of(model)]
    figures = [oracle(layer) for _, layer in layers_of(model)]
    for told, (error, effect) in zip(report.layers, figures, strict=True):
        assert told.scheme == "int4-g32"
        assert told.error == pytest.approx(error, rel=1e-4)
        assert told.effect == pytest.approx(effect, rel=1e-4)
    whole = math.sqrt(sum(error**2 for error, _ in figures) / sum(effect**2 for _, effect in figures))
    assert report.ratio == pytest.approx(whole, rel=1e-4)
    assert report.worst[0].ratio == max(one.ratio for one in report.layers)


def test_figures_equal_an_oracle_on_data_without_padding() -> None:
    model = adapted(packed(), LARGE)
    inputs = tiny_inputs(model.get_base_model())
    kept = inputs["attention_mask"].bool()
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, result: seen.__setitem__(path, args[0][kept])

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers_of(model)]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    report = merge_report(model, hfc.Calibration([inputs], min_rows=1, min_tokens=0))
    assert report.measured == "data"
    for told, (path, layer) in zip(report.layers, layers_of(model), strict=True):
        error, effect = oracle(layer, seen[path])
        assert told.error == pytest.approx(error, rel=1e-4)
        assert told.effect == pytest.approx(effect, rel=1e-4)


def test_small_adapter_is_refused_and_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(packed(), SMALL)
    before, inputs = state(model), tiny_inputs(model.get_base_model())
    logits = output(model, inputs)
    assert merge_report(model).ratio > 0.5
    with pytest.raises(MergeError, match=r"int4-g32.*worst: model\.layers.*Nothing was changed.*save_pretrained"):
        merge_adapter(model)
    assert unchanged(model, before)
    assert torch.equal(output(model, inputs), logits)
    caplog.set_level(logging.INFO, "hf_compress")
    assert isinstance(merge_adapter(model, limit=50.0), PreTrainedModel)
    assert "merging default: error" in caplog.text


def test_large_adapter_is_merged_saved_and_proven(worker: CleanWorker, tmp_path: Path) -> None:
    model = adapted(packed(), LARGE)
    inputs = tiny_inputs(model.get_base_model())
    without = reference_logits(packed(), inputs)
    before, report = output(model, inputs), merge_report(model)
    merged = merge_adapter(model)
    assert not any("lora" in name for name in merged.state_dict())
    assert sum(isinstance(module, PackedModule) for module in merged.modules()) == 14
    # what rounding the weights loses is passed on by two blocks, not amplified
    assert relative(output(merged, inputs), before) < 3 * report.ratio * relative(before, without)
    plan = plan_of(merged)
    assert plan.notes[-1].startswith("merged default: error 0.")
    noise = {row.module: row.sqnr_db for row in plan.quantized}
    assert all(
        noise[one.name] != row.sqnr_db
        for one in report.layers
        for row in plan_of(packed()).quantized
        if row.module == one.name
    )
    assert hfc.save(merged, tmp_path / "out", worker=worker).level == "full"
    loaded = hfc.load(tmp_path / "out")
    assert same_states(loaded, merged)
    assert plan_of(loaded).notes == plan.notes


def test_adapter_that_does_nothing_changes_no_bit() -> None:
    base = packed()
    before = state(base)
    model = adapted(base, 0.0)
    assert merge_report(model).ratio == 0.0
    assert unchanged(merge_adapter(model), before)


def data() -> hfc.Calibration:
    ids = torch.randint(5, 128, (8, 40), generator=torch.Generator().manual_seed(3))
    return hfc.Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "asymmetric": ("llama", lambda: hfc.RTNQuantConfig(bits=4, group_size=32, symmetric=False, format="guarded")),
    "tensor": ("llama", lambda: hfc.RTNQuantConfig(bits=8, group_size="tensor")),
    "int3": ("llama", lambda: hfc.RTNQuantConfig(bits=3, group_size=32)),
    "hqq": ("llama", lambda: hfc.HQQQuantConfig(bits=4, group_size=32)),
    "nf4": ("llama", lambda: hfc.CodebookQuantConfig(group_size=32)),
    "kmeans": ("llama", lambda: hfc.CodebookQuantConfig(codebook="kmeans", bits=4, group_size="channel")),
    "gptq": ("llama", lambda: hfc.GPTQQuantConfig(bits=4, group_size=32, calibration=data())),
    "gptq-layout": ("llama", lambda: hfc.GPTQQuantConfig(bits=4, group_size=32, format="gptq", calibration=data())),
    "w8a8-dynamic": ("llama", hfc.Int8DynamicQuantConfig),
    "w8a8-static": ("llama", lambda: hfc.Int8StaticQuantConfig(calibration=data())),
    "conv1d": ("gpt2", int4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_scheme_merges_what_is_large_enough(name: str) -> None:
    """The merged model does what the adapter's model does, as far as the measure says."""
    family, config = CONFIGS[name]
    base = packed(family, config())
    inputs = tiny_inputs(base)
    plain, before = output(base, inputs), {row.module: row for row in plan_of(base).quantized}
    kept = {path: packed_tensor(one, "weight") for path, one in base.named_modules() if isinstance(one, PackedModule)}
    model = adapted(base, LARGE)
    adapter = output(model, inputs)
    report = merge_report(model)
    assert 0 < report.ratio < 0.5
    merged = merge_adapter(model)
    assert relative(output(merged, inputs), adapter) < 3 * report.ratio * relative(adapter, plain) + 0.02
    changed = {one.name for one in report.layers}
    for path, old in kept.items():
        new = packed_tensor(merged.get_submodule(path), "weight")
        assert new.layout == old.layout
        assert new.parts().keys() == old.parts().keys()
        for part in ("g_idx", "input_scale", "input_zero_point"):
            one, other = getattr(new, part), getattr(old, part)
            assert (one is None and other is None) or torch.equal(one, other)
        assert torch.equal(new.codes, old.codes) is (path not in changed)
    assert {row.module: row.quantization for row in plan_of(merged).quantized} == {
        path: row.quantization for path, row in before.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"value": 2}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_of_lora(options: dict[str, Any]) -> None:
    config = hfc.RTNQuantConfig(bits=8, group_size="channel")
    base = packed("bert-classifier", config)
    inputs = tiny_inputs(base)
    plain = output(base, inputs)
    model = adapted(base, LARGE, **options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude_vector" in name or ("lora_B" in name and name.endswith("bias")):
                value += 0.05 * value.abs().mean() + 0.01
            elif name.endswith("query.base_layer.bias"):
                value += 0.1
    adapter = output(model, inputs)
    merged = merge_adapter(model)
    assert relative(plain, adapter) > 0.003
    assert relative(output(merged, inputs), adapter) < 0.1 * relative(plain, adapter)


def test_two_active_adapters_are_merged_together_and_others_dropped() -> None:
    base = packed(config=hfc.RTNQuantConfig(bits=8, group_size="channel"))
    inputs = tiny_inputs(base)
    model = adapted(base, 0.1)
    for name, seed in (("second", 2), ("third", 3)):
        model.add_adapter(name, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"]))
        filled(model, 0.1, name, seed)
    model.base_model.set_adapter(["default", "second"])
    both = output(model.eval(), inputs)
    assert merge_report(model).adapters == ("default", "second")
    assert relative(output(merge_adapter(model), inputs), both) < 0.01


def test_saved_modules_take_the_place_of_the_originals() -> None:
    base = packed("bert-classifier")
    inputs = tiny_inputs(base)
    model = adapted(base, LARGE, modules_to_save=["classifier"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value += 0.5
    head = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"].detach()
    adapter = output(model, inputs)
    merged = merge_adapter(model)
    assert torch.equal(merged.classifier.weight, head)
    assert relative(output(merged, inputs), adapter) < 0.2


def test_embedding() -> None:
    base = packed(config=hfc.RTNQuantConfig(bits=8, group_size="channel", embeddings="int8"))
    inputs = tiny_inputs(base)
    model = adapted(base, 0.05, target_modules=["embed_tokens"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_embedding_A" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    adapter = output(model, inputs)
    report = merge_report(model, hfc.Calibration([inputs], min_rows=1, min_tokens=0))
    assert [one.name for one in report.layers] == ["model.embed_tokens"]
    assert report.ratio == pytest.approx(merge_report(model).ratio, rel=0.5)
    assert relative(output(merge_adapter(model), inputs), adapter) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dense_base_merges(dtype: torch.dtype) -> None:
    """Exactly as PEFT merges; what the data type rounds off is measured too."""
    model = adapted(tiny("llama", dtype=dtype), 0.1)
    report = merge_report(model)
    assert report.ratio == 0.0 if dtype == torch.float32 else 0.0 < report.ratio < 0.1
    by_peft = adapted(tiny("llama", dtype=dtype), 0.1).merge_and_unload(safe_merge=True)
    assert unchanged(merge_adapter(model), state(by_peft))


def test_dense_layer_of_a_compressed_model_merges() -> None:
    base = packed()
    inputs = tiny_inputs(base)
    model = adapted(base, LARGE, target_modules=["q_proj", "lm_head"])
    adapter, report = output(model, inputs), merge_report(model)
    assert [one.scheme for one in report.layers] == ["int4-g32", "int4-g32", "float32"]
    assert report.layers[-1].ratio == 0.0
    assert relative(output(merge_adapter(model), inputs), adapter) < 0.2


def library_model(kind: str, folder: Path) -> Any:
    """A tiny model that stock transformers has loaded quantized."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(**four if kind == "nf4" else {"load_in_8bit": True})
    path = tiny_dir("llama", folder)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config).eval()


@pytest.mark.parametrize(
    ("kind", "small", "large"), [("nf4", SMALL, LARGE), ("int8", 1e-5, 0.1), ("torchao", 1e-5, 0.1)]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_of_other_libraries(kind: str, small: float, large: float, tmp_path: Path) -> None:
    """PEFT merges a small adapter into 4-bit weights without a word, and what it has learned is gone."""
    model = adapted(library_model(kind, tmp_path), small)
    inputs = tiny_inputs(model.get_base_model())
    logits = output(model, inputs)
    assert merge_report(model).ratio > 0.5
    with pytest.raises(MergeError, match="Nothing was changed"):
        merge_adapter(model)
    assert torch.equal(output(model, inputs), logits)

    filled(model, large)
    logits, report = output(model, inputs), merge_report(model)
    assert 0 < report.ratio < 0.5
    merged = merge_adapter(model)
    by_peft = adapted(library_model(kind, tmp_path), large).merge_and_unload()
    # 4-bit scales become bfloat16 in the first forward on some processors: 2^-9 of each, and ours has had one
    assert relative(output(merged, inputs), output(by_peft, inputs)) <= (0.02 if kind == "nf4" else 0.0)
    assert relative(output(merged, inputs), logits) < 0.2


def _disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def _merged_before(model: Any) -> Any:
    layer = dict(model.named_modules())["base_model.model.lm_head"]
    layer.merge()
    return model


REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no-peft-model": (packed, UnsupportedModelError, "no PeftModel"),
    "disabled": (lambda: _disabled(adapted(packed(), LARGE)), MergeError, "adapters are disabled"),
    "merged-before": (
        lambda: _merged_before(adapted(packed(), LARGE, target_modules=["q_proj", "lm_head"])),
        MergeError,
        "merged already",
    ),
    "other-tuner": (
        lambda: peft.get_peft_model(tiny("llama"), peft.LoHaConfig(target_modules=["q_proj"])),
        MergeError,
        "no LoRA layer",
    ),
    "prompt": (
        lambda: peft.get_peft_model(packed(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        MergeError,
        "no active LoRA adapter",
    ),
    "tied": (
        lambda: adapted(tiny("llama-tied"), LARGE, target_modules=["embed_tokens"]),
        MergeError,
        "tied to another module",
    ),
    "tied-packed": (
        lambda: adapted(
            packed("llama-tied", hfc.RTNQuantConfig(bits=8, group_size="channel", embeddings="int8")),
            LARGE,
            target_modules=["embed_tokens"],
        ),
        MergeError,
        "tied to another module",
    ),
    "bias-without-bias": (lambda: adapted(packed(), LARGE, lora_bias=True), MergeError, "can't be merged: Impossible"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_is_refused(name: str) -> None:
    make, kind, said = REFUSALS[name]
    model = make()
    before = state(model)
    with pytest.raises(kind, match=said):
        merge_adapter(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, "0.5", True])
def test_limit_is_a_positive_number(limit: Any) -> None:
    with pytest.raises(ConfigError, match="limit="):
        merge_adapter(nn.Linear(2, 2), limit=limit)


def test_nan_in_an_adapter_is_named() -> None:
    model = adapted(packed(), LARGE)
    next(value for name, value in model.named_parameters() if "lora_B" in name).data.fill_(math.nan)
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj can't be merged: NaNs detected"):
        merge_adapter(model)


def test_data_that_reaches_no_layer_is_refused() -> None:
    model = adapted(packed(), LARGE)
    hidden = torch.zeros(8, 1, 64)
    batch = {"inputs_embeds": hidden, "attention_mask": torch.zeros(8, 1, dtype=torch.long)}
    with pytest.raises(CalibrationError):
        merge_report(model, hfc.Calibration([batch], min_tokens=0))


def test_without_peft_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendError, match=r'pip install "hf-compress\[lora\]"'):
        merge_adapter(nn.Linear(2, 2))


def test_report_reads_worst_first() -> None:
    text = str(merge_report(adapted(packed(), LARGE)))
    assert text.startswith("merging default: error 0.")
    shares = [float(line.split()[0]) for line in text.splitlines()[1:]]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert MergeReport((), "weights", ()).ratio == 0.0


def test_columns_in_any_order_merge_as_in_their_own() -> None:
    """Of GPTQ checkpoints with `desc_act`: groups that are no consecutive columns."""
    plain, base = packed(), packed()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    for path, module in base.named_modules():
        if path.endswith("q_proj"):
            held = packed_tensor(module, "weight")
            codes, moved = unpack_codes(held.codes, 4, 64), torch.empty(64, 64, dtype=torch.int8)
            moved[:, order] = codes
            g_idx = torch.empty(64, dtype=torch.int32)
            g_idx[order] = torch.arange(64, dtype=torch.int32) // 32
            module.weight_packed = to_words(moved, 4)
            module.register_buffer("weight_g_idx", g_idx)
    models = [adapted(model, LARGE, target_modules=["q_proj"]) for model in (plain, base)]
    for (_, straight), (_, shuffled) in zip(*map(layers_of, models), strict=True):
        shuffled.lora_A["default"].weight.data[:, order] = straight.lora_A["default"].weight.data
    reports = [merge_report(model) for model in models]
    for one, other in zip(*(report.layers for report in reports), strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-5)
        assert other.effect == pytest.approx(one.effect, rel=1e-5)
    merged = [merge_adapter(model) for model in models]
    for path, module in merged[0].named_modules():
        if path.endswith("q_proj"):
            other = merged[1].get_submodule(path)
            assert torch.equal(other.weight[:, order], module.weight + 0)
