"""`convert`: the packed model gives what the fake-quantized one gave, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_compress as hfc
from hf_compress.apply.planning import is_quantized
from hf_compress.checkpoint.handover import training_plan_of
from hf_compress.core.errors import (
    AlreadyQuantizedError,
    CalibrationError,
    UnsupportedModelError,
    WeightValueError,
)
from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from hf_compress.training.qat.convert import convert, unseen_inputs
from hf_compress.training.qat.modules import commit_ranges, fake_modules, set_phase
from tests._utils.tiny import output, tiny, tiny_inputs
from tests.conformance.helpers import reference_logits

from .runs import same, state

INT4: dict[str, Any] = {"bits": 4, "group_size": 16}
TOKEN: dict[str, Any] = {"bits": 8, "group_size": "channel", "activation_bits": 8}
STATIC: dict[str, Any] = {**TOKEN, "activation_strategy": "tensor"}


def prepared(family: str, config: QATConfig, **overrides: Any) -> Any:
    """A model with fake quantization at work, whose observers have seen a batch."""
    model = tiny(family, **overrides)
    QATCallback(config).prepare(model)
    set_phase(model, quantize=True, observe=True)
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(3)
        output(model.train(), tiny_inputs(model))
    commit_ranges(model)
    return model.eval()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("bert-classifier", INT4),
    "asymmetric": ("llama", {**INT4, "symmetric": False}),
    "3 bits": ("llama", {"bits": 3, "group_size": 32}),
    "one scale": ("vit", {"bits": 8, "group_size": "tensor"}),
    "tied table": ("llama-tied", {**INT4, "embeddings": "int8"}),
    "conv1d": ("gpt2", INT4),
    "conv2d": ("resnet", {"bits": 4, "group_size": "channel"}),
    "experts": ("qwen3-moe", INT4),
    "inputs per token": ("bert-classifier", TOKEN),
    "static inputs": ("bert-classifier", STATIC),
    "static inputs of convolutions": ("resnet", STATIC),
    "learned scales": ("bert-classifier", {**INT4, "learn_scales": True}),
    "learned scales, static inputs": ("llama", {**STATIC, "learn_scales": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_model_gives_what_the_fake_quantized_one_gave(case: str) -> None:
    family, fields = CASES[case]
    model = prepared(family, QATConfig(**fields))
    if fields.get("learn_scales"):
        generator = torch.Generator().manual_seed(5)
        for name, value in model.named_parameters():
            if name.endswith("hfc_scale_bias"):
                value.data.add_(0.2 * torch.randn(value.shape, generator=generator))
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    assert not torch.equal(before, output(tiny(family), inputs))
    assert convert(model) is model
    assert is_quantized(model)
    assert training_plan_of(model) is None
    assert not list(fake_modules(model))
    assert not [name for name in model.state_dict() if "hfc_" in name]
    assert torch.equal(reference_logits(model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    model = prepared("llama", QATConfig(**INT4), dtype=dtype)
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    assert torch.equal(reference_logits(convert(model), inputs), before)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["bert-classifier", "gpt2", "resnet", "qwen3-moe"])
def test_untrained_weights_give_what_rounding_to_nearest_gives(family: str) -> None:
    fields: dict[str, Any] = {"bits": 4, "group_size": "channel"} if family == "resnet" else INT4
    model = convert(prepared(family, QATConfig(**fields)))
    peer = hfc.quantize(tiny(family), hfc.RTNQuantConfig(**fields))
    if family == "resnet":  # its batch norms have seen a batch
        assert model.state_dict().keys() == peer.state_dict().keys()
        packed = [name for name in peer.state_dict() if name.endswith(("_packed", "_scale"))]
        assert packed
        assert all(torch.equal(model.state_dict()[name], peer.state_dict()[name]) for name in packed)
        return
    assert same(state(model), state(peer))


class Recurrent(torch.nn.Module):
    """A plain module of a kind of layers that transformers' models rarely have."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(32, 32, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(32, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(values)[0])


def test_plain_modules_and_recurrent_layers_are_packed_too() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Recurrent().eval()
        values = torch.randn(2, 5, 32)
    QATCallback(QATConfig(**INT4, learn_scales=True)).prepare(model)
    with torch.no_grad():
        before = model(values)
        assert sorted(name for name in convert(model).state_dict() if name.endswith("_packed")) == [
            "head.weight_packed",
            *(f"lstm.weight_{kind}_l{layer}_packed" for kind in ("hh", "ih") for layer in (0, 1)),
        ]
        assert torch.equal(model(values), before)


def test_a_compiled_model_comes_out_of_its_wrapper() -> None:
    model = prepared("bert-classifier", QATConfig(**INT4))
    compiled: Any = torch.compile(model)
    assert convert(compiled) is model


def test_there_must_be_something_to_convert() -> None:
    model = tiny("bert-classifier")
    with pytest.raises(UnsupportedModelError, match=r"no fake quantization.*QATCallback"):
        convert(model)
    packed = hfc.quantize(model, hfc.RTNQuantConfig(**INT4))
    with pytest.raises(UnsupportedModelError, match="converted or quantized already"):
        convert(packed)


def test_inputs_that_nobody_saw_are_named_and_nothing_changes() -> None:
    model = tiny("bert-classifier")
    QATCallback(QATConfig(**STATIC)).prepare(model)
    before, plan = state(model), training_plan_of(model)
    assert plan is not None
    with pytest.raises(CalibrationError, match=r"inputs of \d+ layers: bert.encoder.layer.0"):
        convert(model)
    assert training_plan_of(model) is plan
    assert same(before, state(model))
    assert len(unseen_inputs(model, plan)) > 5
    assert not unseen_inputs(prepared("bert-classifier", QATConfig(**STATIC)), plan)
    per_token = prepared("bert-classifier", QATConfig(**TOKEN))
    assert not unseen_inputs(per_token, training_plan_of(per_token))


def test_weights_that_are_not_finite_are_refused_and_nothing_changes() -> None:
    model = prepared("bert-classifier", QATConfig(**INT4))
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightValueError, match=r"layer.1.output.dense holds 1 NaN"):
        convert(model)
    assert training_plan_of(model) is not None
    assert list(fake_modules(model))


def test_a_prepared_model_is_not_taken_for_a_packed_or_a_plain_one(tmp_path: Any) -> None:
    model = prepared("bert-classifier", QATConfig(**INT4))
    with pytest.raises(UnsupportedModelError, match=r"hf_compress.convert\(model\) first"):
        hfc.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AlreadyQuantizedError, match="prepared for quantization-aware training"):
        hfc.quantize(model, hfc.RTNQuantConfig())
    with pytest.raises(AlreadyQuantizedError, match="prepared for quantization-aware training"):
        hfc.plan(model, hfc.RTNQuantConfig())
