"""Weights that are read past their own layer: refused by the first forward, and right once they are skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_compress.apply.planning import plan_model
from hf_compress.core.errors import UnsupportedModelError
from hf_compress.training.qat.config import QATConfig
from hf_compress.training.qat.convert import convert
from hf_compress.training.qat.modules import insert_fake_quant, remove_fake_quant
from tests._utils.tiny import tiny, tiny_inputs

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2}
WAVLM: dict[str, Any] = {
    **SMALL,
    "vocab_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 20,
}
FIELDS: dict[str, Any] = {"bits": 3, "group_size": "channel", "min_coverage": 0}


def wavlm() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    return built("WavLMForCTC", transformers.WavLMConfig(**WAVLM)), {"input_values": random(2, 800)}


def mamba() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = transformers.MambaConfig(**SMALL, vocab_size=128, state_size=8)
    return built("MambaForCausalLM", config), {"input_ids": torch.arange(18).reshape(2, 9)}


def built(name: str, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = getattr(transformers, name)(config)
    return model.eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def prepared(model: Any, **fields: Any) -> Any:
    config = QATConfig(**{**FIELDS, **fields})
    insert_fake_quant(model, plan_model(model, config), config.fields)
    return model


def hooks(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


WAVLM_SKIP = [f"wavlm.encoder.layers.*.attention.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
CASES = [(wavlm, WAVLM_SKIP), (mamba, ["backbone.layers.*.mixer.dt_proj"])]


@pytest.mark.touches_rng  # WavLM leaves out layers
@pytest.mark.filterwarnings("ignore")  # of the sequential path of Mamba, of WavLM's masks
@pytest.mark.parametrize(("make", "skip"), CASES, ids=["wavlm", "mamba"])
def test_refused_with_what_to_skip(make: Any, skip: list[str]) -> None:
    model, inputs = make()
    prepared(model)
    pasted = ", ".join(f'"{one}"' for one in skip)
    for _ in range(2):  # it stays refused
        with pytest.raises(UnsupportedModelError, match="reads the values of") as error, torch.no_grad():
            model(**inputs)
        assert error.value.fix == f"QATConfig(..., skip=[{pasted}])"
    with pytest.raises(UnsupportedModelError):
        model.train()(**inputs)

    model, inputs = make()
    with torch.no_grad():
        before = model(**inputs).logits
        fake = prepared(model, skip=skip)(**inputs).logits
        convert(model)
        assert torch.equal(model(**inputs).logits, fake)
    assert not torch.equal(fake, before)


@pytest.mark.touches_rng  # dropout
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("family", ["t5", "vit", "llama-tied", "qwen3-moe"])
def test_questions_about_the_form_are_no_reads(family: str, start: int) -> None:
    """T5 asks for the data type of a weight in every forward. Each mode is watched once."""
    model = prepared(tiny(family), bits=4, start=start)
    given = hooks(model)
    copied = copy.deepcopy(model)
    for mode in (False, True, True):
        model.train(mode)
        output = model(**tiny_inputs(model))
        assert hooks(model) == (given - 2 if mode else given)
    output.logits.sum().backward()
    assert hooks(copied) == given
    for mode in (False, True):
        copied.train(mode)(**tiny_inputs(model))
    assert hooks(copied) == given - 2
    assert "hfc_watch" not in vars(copied)


class Reader(nn.Module):
    """Computes with a layer's weight, or with the layer: always, or in training only."""

    def __init__(self, calls: bool = False, calls_in_training: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.calls = calls
        self.calls_in_training = calls_in_training

    def forward(self, value: Tensor) -> Tensor:
        calls = self.calls or (self.calls_in_training and self.training)
        return self.layer(value) if calls else functional.linear(value, self.layer.weight, self.layer.bias)


def reader(calls: bool = False, calls_in_training: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Reader(calls, calls_in_training).eval()


def test_what_evaluation_alone_reads_is_told_as_such() -> None:
    model = prepared(reader(calls_in_training=True))
    model.train()(random(2, 64))
    with pytest.raises(UnsupportedModelError, match=r"In evaluation mode Reader reads .* no longer agree") as error:
        model.eval()(random(2, 64))
    assert error.value.fix == 'QATConfig(..., skip=["layer"])'
    with pytest.raises(UnsupportedModelError, match=r"\] Reader reads .* trained in floating point"):
        prepared(reader()).train()(random(2, 64))


def test_users_may_read_outside_of_a_forward() -> None:
    model = prepared(reader(calls=True))
    assert model.layer.weight is model.layer.get_parameter("weight")
    assert bool(model.layer.weight.any())
    model(random(2, 64))
    with pytest.raises(RuntimeError):
        model.train()(random(2, 63))
    assert hooks(model) == 2  # the mode of a forward that failed is watched again
    assert model.layer.weight is model.layer.get_parameter("weight")
    model(random(2, 64))
    assert hooks(model) == 0


def test_nothing_is_left_once_it_is_removed() -> None:
    model = prepared(reader())
    remove_fake_quant(model)
    assert hooks(model) == 0
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("hfc_")]
    model(random(2, 64))


def test_compiled_code_reads_rounded_values_everywhere() -> None:
    """Nothing is watched there: whoever reads a weight gets the values that it has once packed."""
    torch.compiler.reset()
    model, other = prepared(reader()), prepared(reader(calls=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (False, True):
        assert torch.equal(compiled.train(mode)(random(2, 64)), other(random(2, 64)))
    compiled(random(2, 64)).square().sum().backward()
    other(random(2, 64)).square().sum().backward()
    assert torch.equal(model.layer.weight.grad, other.layer.weight.grad)
    torch.compiler.reset()


@pytest.mark.touches_rng  # checkpoints put the state back
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, model = (prepared(tiny("t5", dropout_rate=0.0)) for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for one in (plain, model):
        one.train()(**tiny_inputs(one)).logits.square().mean().backward()
    gradients = {name: value.grad for name, value in plain.named_parameters()}
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        # sums of float32 in another order: 1e-5 of the largest one
        assert float((value.grad - gradients[name]).abs().max()) <= 1e-5 * float(value.grad.abs().max()), name
