"""What hooks collect equals what models return when asked, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.core.errors import TeacherError, TrainerError, UnsupportedModelError
from hf_compress.training.distillation.features import Layers, Place, watching
from hf_compress.training.distillation.fused import Split
from tests._utils.tiny import HIDDEN, tiny, tiny_inputs

ALONE = [
    "bert",
    "bert-mlm",
    "roberta",
    "distilbert",
    "deberta",
    "modernbert",
    "llama",
    "gpt2",
    "opt",
    "qwen3-moe",
    "vit",
]
PAIRED = ["t5", "bart", "whisper"]
NARROW = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 128}
FUSED: dict[str, tuple[str, dict[str, Any], Split]] = {
    "gpt-neox": ("GPTNeoX", {**NARROW, "num_attention_heads": 4, "intermediate_size": 64}, Split(64, 64, 4)),
    "bloom": ("Bloom", {"hidden_size": HIDDEN, "n_layer": 1, "vocab_size": 128, "n_head": 4}, Split(64, 64, 4)),
    "falcon": (
        "Falcon",
        {**NARROW, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
        Split(64, 32, 2),
    ),
    "phi3": (
        "Phi3",
        {**NARROW, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0},
        Split(64, 32, 0),
    ),
    "bigcode": (
        "GPTBigCode",
        {"n_embd": HIDDEN, "n_layer": 1, "n_head": 4, "vocab_size": 128, "multi_query": True},
        Split(64, 16, 0),
    ),
}
"""Class, config, and how one layer's outputs are divided into queries, keys and values."""


def fused(name: str) -> PreTrainedModel:
    kind, values, _ = FUSED[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.eval()


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def everywhere(layers: Layers, start: int = 0) -> list[Place]:
    return [(stack, layer) for stack in range(len(layers.stacks)) for layer in range(start, layers.count(stack) + 1)]


@pytest.mark.parametrize("family", ALONE)
def test_hidden_states_are_those_that_the_model_returns(family: str) -> None:
    model, layers = (made := tiny(family)), Layers(made)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        base = model.base_model(**inputs, output_hidden_states=True)  # installs hooks of its own, which stay
        before = hooks(model)
        with watching(layers, everywhere(layers), []) as seen:
            model(**inputs)
    assert hooks(model) == before
    states = [*base.hidden_states[:-1], base.last_hidden_state]
    assert len(states) == layers.count(0) + 1 == 3
    for layer, expected in enumerate(states):
        assert torch.equal(seen.hidden_of((0, layer)), expected)
    assert not torch.equal(seen.hidden_of((0, 0)), seen.hidden_of((0, 1)))


@pytest.mark.parametrize("family", PAIRED)
def test_encoders_and_decoders_are_two_stacks(family: str) -> None:
    model, layers = (made := tiny(family)), Layers(made)
    with torch.no_grad(), watching(layers, everywhere(layers), []) as seen:
        made = model(**tiny_inputs(model), output_hidden_states=True)
    for stack, states in enumerate((made.encoder_hidden_states, made.decoder_hidden_states)):
        assert len(states) == layers.count(stack) + 1
        for layer, expected in enumerate(states):
            assert torch.equal(seen.hidden_of((stack, layer)), expected)


@pytest.mark.parametrize("family", [*ALONE, *PAIRED])
def test_queries_keys_and_values_have_a_row_for_each_token(family: str) -> None:
    model, layers = (made := tiny(family)), Layers(made)
    with torch.no_grad(), watching(layers, everywhere(layers), everywhere(layers, 1)) as seen:
        model(**tiny_inputs(model))
    for place in everywhere(layers, 1):
        parts = seen.attention_of(place)
        assert {part.shape[:2] for part in parts} == {seen.hidden_of(place).shape[:2]}
        assert parts[0].shape[-1] == HIDDEN
        assert not torch.equal(parts[0], parts[1])


def test_separate_layers_are_told_by_their_names() -> None:
    model, layers = (made := tiny("bert")), Layers(made)
    attention = model.encoder.layer[1].attention.self
    with torch.no_grad(), watching(layers, [(0, 1)], [(0, 2)]) as seen:
        model(**tiny_inputs(model))
        expected = [getattr(attention, name)(seen.hidden_of((0, 1))) for name in ("query", "key", "value")]
    assert all(torch.equal(own, other) for own, other in zip(seen.attention_of((0, 2)), expected, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FUSED)
def test_one_layer_for_all_three_is_divided_as_the_model_does(name: str, implementation: str) -> None:
    model = fused(name)
    model.set_attn_implementation(implementation)
    layers = Layers(model)
    with torch.no_grad():
        plain = model(**tiny_inputs(model)).logits
        with watching(layers, [], [(0, 1)]) as seen:
            watched = model(**tiny_inputs(model)).logits
    assert list(layers.splits.values()) == [FUSED[name][2]]
    assert torch.equal(watched, plain)
    assert hooks(model) == 0
    assert seen.attention_of((0, 1))[2].shape[-1] == FUSED[name][2].others


def test_the_trial_does_not_care_for_training_mode() -> None:
    """GPT-2 with dropout of attention; the values are told all the same, and training goes on."""
    model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train()
    layers = Layers(model)
    with torch.random.fork_rng(devices=[]), watching(layers, [], [(0, 2)]):
        model(**tiny_inputs(model))
    assert list(layers.splits.values()) == [Split(HIDDEN, HIDDEN, 0)]
    assert all(module.training for module in model.modules())


def test_hooks_are_gone_after_an_error() -> None:
    model, layers = (made := tiny("gpt2")), Layers(made)
    with pytest.raises(ValueError, match="have to specify"), watching(layers, everywhere(layers), [(0, 1)]):
        model(input_ids=None)
    assert hooks(model) == 0


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor | None]]:
    layers = Layers(model)
    with watching(layers, [(0, 1)], [(0, 2)]) as seen:
        outputs = model(**tiny_inputs(model))
    parts = [outputs.logits, seen.hidden_of((0, 1)), *seen.attention_of((0, 2))]
    loss = sum(((part**2).mean() for part in parts), torch.zeros(()))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert-mlm", "llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert-mlm" else {}
    silent |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny(family, **silent).train()
    loss, gradients = loss_and_gradients(model)
    model = tiny(family, **silent).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, others = loss_and_gradients(model)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        other = others[name]
        assert (gradient is None) == (other is None)
        assert gradient is None or (other is not None and torch.equal(gradient, other))


def test_reentrant_checkpointing_is_refused_where_it_hides_gradients() -> None:
    model = tiny("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    layers = Layers(model)
    with watching(layers, [(0, 1)], []) as seen:  # blocks are outside of what is checkpointed
        model(**tiny_inputs(model))
    assert seen.hidden_of((0, 1)).requires_grad
    with pytest.raises(TrainerError, match="use_reentrant"), watching(layers, [], [(0, 1)]):
        model(**tiny_inputs(model))


def test_layers_that_put_tokens_first_are_refused() -> None:
    """Longformer's: relations between rows of the batch are not what is wanted."""
    config = transformers.LongformerConfig(
        **NARROW, num_attention_heads=4, intermediate_size=64, attention_window=4, max_position_embeddings=64
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.LongformerModel(config).eval()
    layers = Layers(model)
    with torch.no_grad(), watching(layers, [(0, 1)], []) as seen:
        model(torch.full((2, 8), 5))
    assert seen.hidden_of((0, 1)).shape == (2, 8, HIDDEN)
    with pytest.raises(UnsupportedModelError, match=r"makes \[8, 2, 64\] where"), watching(layers, [], [(0, 1)]):
        model(torch.full((2, 8), 5))


def test_packed_teachers() -> None:
    model = tiny("bert")
    inputs = tiny_inputs(model)
    packed = hfc.quantize(tiny("bert"), hfc.RTNQuantConfig(bits=8, group_size=32))
    layers = Layers(packed)
    with torch.no_grad(), watching(layers, [(0, 2)], [(0, 2)]) as seen:
        packed(**inputs)
        expected = model(**inputs).last_hidden_state
    assert (seen.hidden_of((0, 2)) - expected).norm() < 0.05 * expected.norm()
    assert len(seen.attention_of((0, 2))) == 3


def test_layers_that_share_weights_are_refused() -> None:
    model = tiny("albert")
    layers = Layers(model)
    for hidden, attention in (([(0, 1)], []), ([], [(0, 1)])):
        with pytest.raises(UnsupportedModelError, match="more than once"), watching(layers, hidden, attention):
            model(**tiny_inputs(model))
    assert hooks(model) == 0


def test_a_layer_that_was_left_out_is_told() -> None:
    model = tiny("bart", encoder_layerdrop=1.0).train()
    layers = Layers(model)
    with torch.random.fork_rng(devices=[]), watching(layers, [(0, 1)], [(0, 2)]) as seen:
        model(**tiny_inputs(model))
    for wanted in (lambda: seen.hidden_of((0, 1)), lambda: seen.attention_of((0, 2))):
        with pytest.raises(TeacherError, match=r"encoder\.layers\.\d\) of BartFor.* did not run"):
            wanted()


def test_compiled_models_are_refused() -> None:
    model = tiny("bert")
    with pytest.raises(TrainerError, match="compiled"):
        Layers(torch.compile(model))  # type: ignore[arg-type]
    model.compile()
    with pytest.raises(TrainerError, match="compiled"):
        Layers(model)


class Mixer(nn.Module):
    """A block without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blend = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.blend(value)


class Plain(nn.Module):
    """A module that transformers does not know."""

    def __init__(self, make: Callable[[], nn.Module], count: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, value: Tensor) -> Tensor:
        for block in self.blocks:
            value = block(value)
        return value


def test_plain_modules() -> None:
    model = Plain(Mixer)
    layers = Layers(model)
    value = torch.ones(1, 3, 4)
    with watching(layers, everywhere(layers), []) as seen:
        made = model(value)
    assert torch.equal(seen.hidden_of((0, 0)), value)
    assert torch.equal(seen.hidden_of((0, 1)), model.blocks[0](value))
    assert seen.hidden_of((0, 2)) is made
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 \(Mixer\), which has blend"):
        layers.attention((0, 2))


def test_a_model_without_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="no ModuleList at all"):
        Layers(nn.Linear(2, 2, device="meta"))


def test_maps_are_refused() -> None:
    model = tiny("resnet")
    layers = Layers(model)
    with torch.no_grad(), watching(layers, [(0, 1)], []) as seen:
        model(**tiny_inputs(model))
    with pytest.raises(UnsupportedModelError, match="not rows × tokens × features"):
        seen.hidden_of((0, 1))


def test_a_layer_that_divides_its_outputs_in_an_unknown_way() -> None:
    """Keys first, values second: no known way, and no guess."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)
            self.out = nn.Linear(4, 4)

        def forward(self, value: Tensor) -> Tensor:
            keys, values, queries = self.qkv(value).chunk(3, dim=-1)
            return self.out((queries @ keys.transpose(1, 2)).softmax(-1) @ values)

    model = Plain(Odd)
    layers = Layers(model)
    value = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    message = r"blocks\.1.*makes 12 features, read as 4"
    with pytest.raises(UnsupportedModelError, match=message), watching(layers, [], [(0, 2)]):
        model(value)
