"""What must never look better than it is: merges, edited models, stale proofs, vacuous comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import CorruptCheckpointError, PackedWeightError, ProofError, UnsupportedModelError
from tests._utils.tiny import tiny

CONFIG = hfc.RTNQuantConfig(bits=4, group_size=32)
IDS = torch.tensor([[5, 6, 7, 8]])


def packed() -> PreTrainedModel:
    """A tiny packed Llama."""
    model: PreTrainedModel = hfc.quantize(tiny("llama"), CONFIG)
    return model


def projection(model: PreTrainedModel) -> nn.Module:
    """One of its packed layers."""
    return model.get_submodule("model.layers.0.self_attn.q_proj")


def assign_data(weight: Tensor) -> None:
    weight.data = torch.zeros(weight.shape)


def assign_item(weight: Tensor) -> None:
    weight[0] = 0


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.copy_(torch.zeros(weight.shape)),
        lambda weight: weight.__iadd__(1),
        nn.init.zeros_,
        nn.init.normal_,
        lambda weight: weight.data.copy_(torch.zeros(weight.shape)),
        lambda weight: weight.detach().zero_(),
        lambda weight: torch.add(torch.zeros(64, 64), 1, out=weight),
        lambda weight: torch._foreach_add_([weight], 1),
        assign_data,
        assign_item,
    ],
)
def test_writes_to_a_packed_weight_are_refused(write: Callable[[Tensor], object]) -> None:
    layer = projection(packed())
    before = layer.weight.clone()
    with pytest.raises(PackedWeightError, match="dequantize"), torch.no_grad():
        write(layer.weight)
    assert torch.equal(layer.weight, before)


def test_a_packed_parameter_cannot_be_replaced() -> None:
    with pytest.raises(PackedWeightError, match="dequantize"):
        projection(packed()).weight = nn.Parameter(torch.zeros(64, 64))


@pytest.mark.touches_rng
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("safe", [False, True])
def test_merging_an_adapter_is_refused(safe: bool) -> None:
    model = get_peft_model(packed(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with pytest.raises(PackedWeightError, match="adapter"):
        model.merge_and_unload(safe_merge=safe)


@pytest.mark.touches_rng
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merging_after_dequantize_keeps_the_adapter() -> None:
    model = get_peft_model(packed().dequantize(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
    with torch.inference_mode():
        expected = model(IDS).logits
        merged = model.merge_and_unload()(IDS).logits
    assert torch.allclose(merged, expected, atol=1e-4)


@pytest.mark.touches_rng
def test_a_model_with_an_adapter_is_not_saved_as_a_whole(tmp_path: Path, worker: CleanWorker) -> None:
    model = packed()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedModelError, match="adapter"):
        hfc.save(model, tmp_path / "out", worker=worker)
    assert not list(tmp_path.iterdir())


def test_a_proof_ends_when_other_weights_are_saved_over_it(tmp_path: Path, worker: CleanWorker) -> None:
    assert hfc.save(packed(), tmp_path / "out", worker=worker).level == "full"
    other: PreTrainedModel = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=8, group_size=32))
    other.save_pretrained(tmp_path / "out")
    seen = hfc.inspect(tmp_path / "out")
    assert seen.proof is not None
    assert seen.proof.level == "none"
    assert "int8-g32" in seen.by_scheme


def test_a_proof_ends_when_a_file_is_edited(tmp_path: Path, worker: CleanWorker) -> None:
    hfc.save(packed(), tmp_path / "out", worker=worker)
    (tmp_path / "out" / "config.json").write_text((tmp_path / "out" / "config.json").read_text() + " ")
    seen = hfc.inspect(tmp_path / "out")
    assert seen.proof is not None
    assert seen.proof.level == "none"
    assert "config.json" in seen.proof.reason


def shorten(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def replace_layer(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)


@pytest.mark.touches_rng
@pytest.mark.parametrize("change", [shorten, replace_layer])
def test_an_edited_model_is_neither_saved_nor_called_compressed(
    change: Callable[[PreTrainedModel], None], tmp_path: Path, worker: CleanWorker
) -> None:
    model = packed()
    change(model)
    with pytest.raises(UnsupportedModelError, match="changed since"):
        hfc.save(model, tmp_path / "out", worker=worker)
    with pytest.raises(UnsupportedModelError, match="changed since"):
        hfc.inspect(model)
    assert not list(tmp_path.iterdir())


def test_outputs_without_finite_values_prove_nothing(tmp_path: Path, worker: CleanWorker) -> None:
    dense = tiny("llama")
    dense.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ProofError, match="no finite value"):
        hfc.save(hfc.quantize(dense, CONFIG), tmp_path / "out", worker=worker)
    assert not list(tmp_path.iterdir())


def test_inspect_names_the_kernel_that_runs() -> None:
    model: PreTrainedModel = hfc.quantize(tiny("llama"), hfc.Int8DynamicQuantConfig())
    assert set(hfc.inspect(model.to(torch.bfloat16)).kernels or {}) == {"reference"}


def test_relative_paths_do_not_depend_on_the_worker(
    tmp_path: Path, worker: CleanWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.request("ping")
    monkeypatch.chdir(tmp_path)
    assert hfc.save(packed(), "relative", worker=worker).level == "full"


def test_hub_options_reach_the_upload(tmp_path: Path) -> None:
    """`save_pretrained(push_to_hub=True)` must not drop `private`: the class records the call instead of uploading."""
    model = packed()
    seen: dict[str, object] = {}

    class Recorded(type(model)):  # type: ignore[misc]
        def push_to_hub(self, repo_id: str, **options: object) -> None:
            seen.update(repo_id=repo_id, **options)

    model.__class__ = Recorded
    model.save_pretrained(tmp_path / "out", push_to_hub=True, private=True, commit_message="hi", create_pr=True)
    assert seen == {"repo_id": "out", "private": True, "commit_message": "hi", "create_pr": True}


@pytest.mark.touches_rng
def test_saving_an_adapter_or_from_another_rank_keeps_guarded_weights(tmp_path: Path, worker: CleanWorker) -> None:
    out = tmp_path / "out"
    hfc.save(hfc.quantize(tiny("gpt2"), CONFIG), out, worker=worker)
    model = hfc.load(out)
    model.save_pretrained(out, is_main_process=False)
    model.add_adapter(LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    model.save_pretrained(out)
    assert (out / "adapter_model.safetensors").is_file()
    assert hfc.load(out).config.model_type == "gpt2"


def test_dequantize_after_a_save() -> None:
    model = packed()
    with torch.inference_mode():
        expected = model(IDS).logits
        model.config.dtype = "float32"  # what transformers leaves behind after save_pretrained
        assert torch.equal(model.dequantize()(IDS).logits, expected)


def test_dense_weights_saved_over_a_guarded_checkpoint_are_not_read_as_it(tmp_path: Path, worker: CleanWorker) -> None:
    hfc.save(hfc.quantize(tiny("gpt2"), CONFIG), tmp_path / "out", worker=worker)
    tiny("gpt2").save_pretrained(tmp_path / "out")
    with pytest.raises(CorruptCheckpointError, match="another save"):
        hfc.load(tmp_path / "out")


@pytest.mark.touches_rng
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_wrapped_base_model_is_not_saved(tmp_path: Path, worker: CleanWorker) -> None:
    inner = get_peft_model(packed(), LoraConfig(target_modules=["q_proj"], r=2)).base_model.model
    for save in (lambda: hfc.save(inner, tmp_path / "out", worker=worker), lambda: inner.save_pretrained(tmp_path)):
        with pytest.raises(UnsupportedModelError, match="adapter"):
            save()


def test_compiled_layers_are_inspected_but_not_saved(tmp_path: Path) -> None:
    model = packed()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert hfc.inspect(model).coverage == 1.0
    with pytest.raises(UnsupportedModelError, match="compile"):
        model.save_pretrained(tmp_path)


def test_layers_of_another_scheme_are_noticed() -> None:
    model, other = packed(), hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=8, group_size=32))
    model.model.layers[0].mlp.up_proj = other.model.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match="up_proj"):
        hfc.inspect(model)
