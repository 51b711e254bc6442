from __future__ import annotations

from collections import Counter
from math import prod

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertForSequenceClassification

from hf_compress.core.weights import Role, Weight, WeightKind, list_weights, small_parameters
from tests._utils.tiny import FAMILIES, tiny, tiny_config

# Kinds and roles per family, counted by hand from the architecture with two layers.
KINDS = {
    "bert": {"linear": 13, "embedding": 3},
    "bert-classifier": {"linear": 14, "embedding": 3},
    "bert-mlm": {"linear": 14, "embedding": 3},
    "distilbert": {"linear": 14, "embedding": 2},
    "llama": {"linear": 15, "embedding": 1},
    "llama-tied": {"linear": 15, "embedding": 1},
    "gpt2": {"conv1d": 8, "linear": 1, "embedding": 2},
    "qwen3-moe": {"linear": 9, "experts": 4, "other": 2, "embedding": 1},
    "mixtral": {"linear": 9, "experts": 4, "other": 2, "embedding": 1},
    "t5": {"linear": 33, "embedding": 5},
    "bart": {"linear": 33, "embedding": 5},
    "whisper": {"linear": 33, "conv": 2, "embedding": 3},
    "vit": {"linear": 13, "conv": 1, "other": 2},
    "resnet": {"linear": 1, "conv": 6},
}
HEADS = {
    "bert": set(),
    "bert-classifier": {"classifier"},
    "bert-mlm": {"cls.predictions.decoder"},
    "distilbert": {"classifier"},
    "llama": {"lm_head"},
    "llama-tied": {"lm_head"},
    "gpt2": {"lm_head"},
    "qwen3-moe": {"lm_head"},
    "mixtral": {"lm_head"},
    "t5": {"lm_head"},
    "bart": {"lm_head"},
    "whisper": {"proj_out"},
    "vit": {"classifier"},
    "resnet": {"classifier.1"},
}


def by_name(family: str, **overrides: object) -> dict[str, Weight]:
    return {weight.name: weight for weight in list_weights(tiny(family, **overrides))}


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_and_heads(family: str) -> None:
    model = tiny(family)
    weights = list_weights(model)
    assert Counter(weight.kind.value for weight in weights) == KINDS[family]
    assert {weight.name for weight in weights if weight.role is Role.HEAD} == HEADS[family]
    embeddings = {weight.name for weight in weights if weight.kind is WeightKind.EMBEDDING}
    assert embeddings == {weight.name for weight in weights if weight.role is Role.EMBEDDING}
    assert len({weight.name for weight in weights}) == len(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_counted_once(family: str) -> None:
    model = tiny(family)
    weights = [weight for weight in list_weights(model) if weight.tied_to is None]
    listed = sum(weight.count for weight in weights) + small_parameters(model)
    assert listed == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_are_the_parameters(family: str) -> None:
    model = tiny(family)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight in list_weights(model):
        shape = tuple(parameters[weight.key].shape)
        canonical = (*shape[:-2], shape[-1], shape[-2]) if weight.transposed else shape
        if weight.kind is WeightKind.CONV:
            assert weight.kernel == shape[1:]
            canonical = (shape[0], prod(shape[1:]))
        assert weight.shape == canonical
        assert weight.dtype == torch.float32
        assert weight.owner == type(model.get_submodule(weight.module)).__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_lists_the_same(family: str) -> None:
    live = tiny(family)
    with torch.device("meta"):
        meta = type(live)(tiny_config(family))
    assert list_weights(meta) == list_weights(live)
    assert small_parameters(meta) == small_parameters(live)


def test_head_is_known_although_the_last_parameter_is_a_bias() -> None:
    model = tiny("bert-classifier")
    assert list(dict(model.named_parameters()))[-1] == "classifier.bias"
    weights = list_weights(model)
    assert weights[-1].name == "classifier"
    assert weights[-1].role is Role.HEAD


def test_pooler_is_no_head() -> None:
    assert by_name("bert-classifier")["bert.pooler.dense"].role is Role.NONE


def test_inside_the_base_model_nothing_is_a_head_by_its_size() -> None:
    """`num_labels` equal to the hidden size must not turn the encoder into heads."""
    with torch.random.fork_rng(devices=[]):
        model = BertForSequenceClassification(tiny_config("bert", num_labels=64))
    assert [weight.name for weight in list_weights(model) if weight.role is Role.HEAD] == ["classifier"]


def test_gpt2_is_transposed() -> None:
    weights = by_name("gpt2")
    attention = weights["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.shape, attention.transposed) == (WeightKind.CONV1D, (192, 64), True)
    assert not weights["lm_head"].transposed


@pytest.mark.parametrize(
    ("family", "head", "source"),
    [
        ("llama-tied", "lm_head", "model.embed_tokens"),
        ("gpt2", "lm_head", "transformer.wte"),
        ("bart", "lm_head", "model.shared"),
        ("bart", "model.encoder.embed_tokens", "model.shared"),
        ("t5", "decoder.embed_tokens", "shared"),
        ("whisper", "proj_out", "model.decoder.embed_tokens"),
    ],
)
def test_ties(family: str, head: str, source: str) -> None:
    weights = by_name(family)
    assert weights[head].tied_to == source
    assert weights[source].tied_to is None
    assert weights[head].role is not Role.NONE


def test_no_ties_where_there_are_none() -> None:
    assert all(weight.tied_to is None for weight in by_name("llama").values())


def test_masked_language_model_ties_its_decoder() -> None:
    with torch.random.fork_rng(devices=[]):
        live = BertForMaskedLM(tiny_config("bert"))
    with torch.device("meta"):
        meta = BertForMaskedLM(tiny_config("bert"))
    for model in (live, meta):
        weights = {weight.name: weight for weight in list_weights(model)}
        assert weights["cls.predictions.decoder"].tied_to == "bert.embeddings.word_embeddings"
        assert weights["cls.predictions.decoder"].role is Role.HEAD


def test_experts_of_qwen3_moe() -> None:
    weights = by_name("qwen3-moe")
    joined = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert (joined.kind, joined.shape, joined.transposed) == (WeightKind.EXPERTS, (8, 128, 64), False)
    assert joined.parts == (
        "model.layers.0.mlp.experts.{}.gate_proj",
        "model.layers.0.mlp.experts.{}.up_proj",
    )
    down = weights["model.layers.1.mlp.experts.down_proj"]
    assert down.shape == (8, 64, 64)
    assert down.parts == ("model.layers.1.mlp.experts.{}.down_proj",)
    assert weights["model.layers.0.mlp.gate"].role is Role.ROUTER


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_routers_are_known(family: str) -> None:
    routers = [weight.name for weight in list_weights(tiny(family)) if weight.role is Role.ROUTER]
    assert routers == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_parts_are_the_names_on_disk(family: str, tmp_path: object) -> None:
    """transformers writes one weight per expert under the model's own names for them."""
    model = tiny(family)
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, model.state_dict())
    for weight in list_weights(model):
        for part in weight.parts:
            names = [f"{part.format(expert)}.weight" for expert in range(weight.shape[0])]
            found = [name for name in names if name in stored or name.replace(".mlp.", ".block_sparse_moe.") in stored]
            assert found == names


def test_plain_modules() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LSTM(4, 4), nn.LayerNorm((2, 4)))
        weights = {weight.name: weight for weight in list_weights(model)}
        alone = list_weights(nn.Linear(4, 3))
    assert {name: weight.kind.value for name, weight in weights.items()} == {
        "0": "embedding",
        "1": "linear",
        "2.weight_ih_l0": "recurrent",
        "2.weight_hh_l0": "recurrent",
        "3": "other",
        "3.bias": "other",
    }
    assert weights["3"].role is Role.NORM
    assert (alone[0].name, alone[0].key) == ("weight", "weight")


def test_empty_module() -> None:
    assert list_weights(nn.Identity()) == []


def test_auto_class_gives_the_same() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert [weight.name for weight in list_weights(model)] == list(by_name("llama"))


def test_weights_of_a_recurrent_layer_in_different_data_types() -> None:
    """Its own forward refuses them, so packing would only hide that until it runs."""
    with torch.random.fork_rng(devices=[]):
        module = nn.LSTM(4, 4)
        alike = nn.LSTM(4, 4).to(torch.float16)
    module.weight_hh_l0.data = module.weight_hh_l0.data.to(torch.float16)
    assert {weight.unpackable for weight in list_weights(module)} == {
        "LSTM has parameters of different data types (float16, float32), which its forward refuses"
    }
    assert not any(weight.unpackable for weight in list_weights(alike))


@pytest.mark.parametrize(
    "name", ["weight_packed", "weight_scale", "weight_zero_point", "weight_codebook", "weight_shape"]
)
@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_names_that_packing_would_take(name: str, kind: str) -> None:
    module = nn.Linear(4, 4, device="meta")
    if kind == "buffer":
        module.register_buffer(name, torch.zeros(1))
    else:
        setattr(module, name, nn.Parameter(torch.zeros(1)) if kind == "parameter" else 1)
    (weight,) = list_weights(module)
    assert weight.unpackable == f"Linear has its own {name}, a name that packing would take"


def test_token_inputs() -> None:
    """Whether inputs can be quantized per token is told by the forward, not by the name of the class."""
    own = type("LSTM", (nn.LSTM,), {"forward": lambda self, x: x})
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4, device="meta"),
            "lstm": nn.LSTM(4, 4, device="meta"),
            "gru": type("Mine", (nn.GRU,), {})(4, 4, device="meta"),
            "own": own(4, 4, device="meta"),
            "rnn": nn.RNN(4, 4, device="meta"),
            "cell": nn.LSTMCell(4, 4, device="meta"),
            "conv": nn.Conv1d(4, 4, 3, device="meta"),
            "attention": nn.MultiheadAttention(4, 2, device="meta"),
        }
    )
    per_token = {weight.module for weight in list_weights(model) if weight.token_inputs}
    assert per_token == {"linear", "lstm", "gru"}
