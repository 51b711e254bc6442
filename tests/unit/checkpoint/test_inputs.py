"""Proof inputs fit tiny models of every kind, on the CPU and without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.inputs import example_inputs, input_ranks, normalise_inputs
from hf_compress.checkpoint.proof_worker import run_inputs
from hf_compress.core.errors import InputError
from tests._utils.tiny import tiny

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
}
VISION = {name: value for name, value in SMALL.items() if name != "vocab_size"} | {
    "image_size": 32,
    "patch_size": 8,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
WAV2VEC2 = SMALL | {
    "conv_dim": [8, 8],
    "conv_kernel": [8, 3],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99}
MOE = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
CLIP = {"text_config": SMALL | {"eos_token_id": 98}, "vision_config": VISION, "projection_dim": 16}
WHISPER = BART | {
    "num_mel_bins": 20,
    "max_source_positions": 30,
    "max_target_positions": 24,
    "pad_token_id": 1,
}
VISION_TEXT = {
    "encoder": VISION | {"model_type": "vit"},
    "decoder": SMALL | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", SMALL),
    "BertForSequenceClassification": ("BertConfig", SMALL),
    "BertForMultipleChoice": ("BertConfig", SMALL),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL | {"max_position_embeddings": 20}),
    "DistilBertModel": ("DistilBertConfig", DISTIL),
    "LlamaForCausalLM": ("LlamaConfig", SMALL | {"num_key_value_heads": 2}),
    "LlamaForSequenceClassification": ("LlamaConfig", SMALL | {"num_key_value_heads": 2}),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", MOE),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "BartForSequenceClassification": ("BartConfig", BART),
    "ViTModel": ("ViTConfig", VISION),
    "ResNetForImageClassification": ("ResNetConfig", RESNET),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", WAV2VEC2),
    "CLIPModel": ("CLIPConfig", CLIP),
    "VisionEncoderDecoderModel": ("VisionEncoderDecoderConfig", VISION_TEXT),
}
# Bart's classifier indexes by the places of the end token, so its path depends on values.
NOT_ON_META = {"BartForSequenceClassification"}


def build(name: str) -> PreTrainedModel:
    kind, values = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = getattr(transformers, name)(getattr(transformers, kind)(**values))
        return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_example_inputs_run_and_reproduce(name: str) -> None:
    model = build(name)
    before = torch.random.get_rng_state()
    sets = example_inputs(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(sets) == 2
    outputs = run_inputs(model, sets)
    assert {key.partition(".")[0] for key in outputs} == {"0", "1"}
    assert all(bool(value.isfinite().all()) for value in outputs.values())
    again = example_inputs(model)
    assert all(torch.equal(one[key], other[key]) for one, other in zip(sets, again, strict=True) for key in one)
    shapes = [{key: value.shape for key, value in one.items()} for one in sets]
    assert shapes[0] != shapes[1] or name == "ViTModel"


@pytest.mark.parametrize("name", MODELS)
def test_input_ranks_need_no_weights(name: str) -> None:
    model = build(name)
    ranks = input_ranks(model)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= set(ranks)
    with torch.device("meta"):
        empty = type(model)(model.config)
    if name in NOT_ON_META:
        with pytest.raises(InputError, match="can't run without weights") as caught:
            input_ranks(empty)
        assert caught.value.__cause__ is not None
        return
    assert input_ranks(empty) == ranks
    for some in (model, empty):
        assert not any(module._forward_pre_hooks for module in some.modules())


def test_poolers_are_found() -> None:
    ranks = input_ranks(build("BertModel"))
    assert ranks["pooler.dense"] == {2}
    assert {path for path, found in ranks.items() if found == {2}} == {"pooler.dense"}
    classifier = input_ranks(build("BertForSequenceClassification"))
    assert {path for path, found in classifier.items() if found == {2}} == {"bert.pooler.dense", "classifier"}
    assert input_ranks(build("CLIPModel"))["visual_projection"] == {2}


def test_input_ranks_from_given_inputs() -> None:
    ids = torch.ones(1, 5, dtype=torch.long)
    assert input_ranks(build("BertModel"), [{"input_ids": ids}])["pooler.dense"] == {2}


def test_training_modes_are_kept_when_the_live_model_is_run() -> None:
    model = build("BartForSequenceClassification").train()
    model.model.encoder.eval()
    before = [module.training for module in model.modules()]
    example_inputs(model)
    assert [module.training for module in model.modules()] == before


def test_conv1d_counts_as_linear() -> None:
    assert input_ranks(build("GPT2LMHeadModel"))["transformer.h.0.attn.c_attn"] == {3}


def test_text_is_padded_in_the_second_row_and_avoids_special_ids() -> None:
    model = build("GPT2LMHeadModel")
    for one in example_inputs(model):
        ids, mask = one["input_ids"], one["attention_mask"]
        assert ids.shape[0] == 2
        assert ids.max() < 99
        assert mask.sum(dim=1).tolist() == [mask.shape[1], mask.shape[1] - 4]
        assert not {1, 2} & set(ids[mask == 1].tolist())
    first, second = example_inputs(model)
    assert first["input_ids"].shape[1] != second["input_ids"].shape[1]
    other = example_inputs(model, seed=1)
    assert not torch.equal(other[0]["input_ids"], first["input_ids"])


def test_pixels_have_the_dtype_of_the_model() -> None:
    assert example_inputs(build("ViTModel").to(torch.bfloat16))[0]["pixel_values"].dtype == torch.bfloat16


def test_model_without_known_arguments_is_an_error() -> None:
    config = transformers.PatchTSTConfig(d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    with pytest.raises(InputError, match="pass inputs"):
        example_inputs(transformers.PatchTSTModel(config))


def test_normalise_accepts_dicts_encodings_and_lists() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)[:, ::2]
    for given in ({"input_ids": ids}, transformers.BatchEncoding({"input_ids": ids}), [{"input_ids": ids}]):
        (one,) = normalise_inputs(given, build("BertModel"))
        assert torch.equal(one["input_ids"], ids)
        assert one["input_ids"].is_contiguous()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a text", "is text"),
        (["a text"], "is text"),
        ([], "non-empty list"),
        ({}, "non-empty dict"),
        (3, "non-empty list"),
        (torch.ones(2, 3), "non-empty list"),
        ([torch.ones(2, 3)], r"inputs\[0\] must be"),
        ({"input_ids": [[1, 2]]}, r"\['input_ids'\] must be a tensor, got list"),
        ({"input_id": torch.ones(1, 2)}, "Did you mean 'input_ids'"),
        ({3: torch.ones(1, 2)}, "argument names"),
    ],
)
def test_normalise_refuses_what_is_no_tensor_set(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalise_inputs(given, build("BertModel"))


def test_input_ranks_of_a_path_that_depends_on_values_come_from_running_the_model() -> None:
    model = tiny("switch").train()
    ranks = input_ranks(model)
    assert ranks["encoder.block.0.layer.1.mlp.wi"] == {3}
    experts = [found for name, found in ranks.items() if ".experts." in name]
    assert {2} in experts
    assert all(found <= {2} for found in experts)  # tokens that were routed to one, if any
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
