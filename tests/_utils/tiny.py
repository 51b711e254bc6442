"""Tiny models with random weights: the architecture of the real one, hidden size 64, two layers, in memory."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

HIDDEN = 64
LAYERS = 2
VOCABULARY = 128
SEED = 20

Built = tuple[str, str, dict[str, Any]]
"""Model class, config class, config values."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

FAMILIES: dict[str, Built] = {
    "bert": ("BertModel", "BertConfig", _ENCODER),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 3}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "hidden_dim": 128,
            "n_layers": LAYERS,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": 2,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "head_dim": 16,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": LAYERS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 10,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 4,
        },
    ),
}


_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_TOWER_TEXT = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_dim": 32}
_TOWERS = {"vision_config": {**_VISION, "projection_dim": 32}, "projection_dim": 32}

MORE: dict[str, Built] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 32, "num_hidden_groups": 1}),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_ENCODER, "max_position_embeddings": 66, "num_labels": 3},
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **_ENCODER,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **_ENCODER,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
        },
    ),
    "layoutlm": (
        "LayoutLMForTokenClassification",
        "LayoutLMConfig",
        {**_ENCODER, "num_labels": 3, "max_2d_position_embeddings": 64},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "ffn_dim": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": HIDDEN,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**_VISION, "num_labels": 10}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": _TOWER_TEXT, **_TOWERS}),
    "blip": (
        "BlipModel",
        "BlipConfig",
        {
            "text_config": {**_TOWER_TEXT, "encoder_hidden_size": HIDDEN, "sep_token_id": 2},
            **_TOWERS,
            "image_text_hidden_size": 32,
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "text_config": {**_DECODER, "model_type": "llama"},
            "vision_config": _VISION,
            "image_token_id": 100,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_DECODER, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 100,
            "image_seq_length": 16,
        },
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**_VISION, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "num_labels": 3},
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 6,
            "num_labels": 3,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 32, 32],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage4"],
            },
        },
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.2,
            "hidden_dim": 320,
            "num_labels": 4,
            "depth_divisor": 8,
        },
    ),
    "mobilenet": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"image_size": 32, "depth_multiplier": 0.25, "num_labels": 4},
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "num_experts": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_ENCODER,
            "conv_dim": [32, 32],
            "conv_kernel": [8, 3],
            "conv_stride": [4, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "encodec": (
        "EncodecModel",
        "EncodecConfig",
        {
            "num_filters": 8,
            "hidden_size": 16,
            "codebook_dim": 16,
            "codebook_size": 16,
            "upsampling_ratios": [2, 2],
            "num_lstm_layers": 2,
            "target_bandwidths": [24.0],
            "sampling_rate": 600,
        },
    ),
}
"""Built by few tests; `FAMILIES` go through all of them."""


def tiny_config(name: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The config of a family, with the class of the model in it."""
    architecture, config, values = {**FAMILIES, **MORE}[name]
    made: transformers.PreTrainedConfig = getattr(transformers, config)(**{**values, **overrides})
    made.architectures = [architecture]
    return made


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """A model of a family with reproducible random weights, in eval mode; leaves the global RNG alone.

    Args:
        name: A key of `FAMILIES` or `MORE`.
        **overrides: Config values; `dtype` is the data type of the weights.
    """
    dtype = overrides.pop("dtype", torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = getattr(transformers, {**FAMILIES, **MORE}[name][0])(tiny_config(name, **overrides))
        for parameter in model.parameters():
            if parameter.ndim < 2:  # biases and norms: not all zeros and ones, as trained ones aren't
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_dir(name: str, folder: Path, **overrides: Any) -> Path:
    """A saved model of a family, in a directory named after it below `folder`."""
    path = folder / name
    tiny(name, **overrides).save_pretrained(path)
    return path


def tiny_inputs(model: PreTrainedModel, seed: int = 7) -> dict[str, Tensor]:
    """Forward arguments for a tiny model: batch of two, the second row padded where the model takes a mask."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(5, VOCABULARY, (2, 9), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "vit": lambda: {"pixel_values": noise(2, 3, 16, 16)},
        "resnet": lambda: {"pixel_values": noise(2, 3, 32, 32)},
        "whisper": lambda: {"input_features": noise(2, 8, 24), "decoder_input_ids": ids()},
    }
    kind = str(model.config.model_type)
    if kind in makers:
        return makers[kind]()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    made = {"input_ids": ids(), "attention_mask": mask}
    return {**made, "decoder_input_ids": ids()} if model.config.is_encoder_decoder else made


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    made = model(**inputs)
    return made.logits if "logits" in made else made.last_hidden_state


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer in memory whose ids fit every tiny model's vocabulary."""
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
    known = special + sorted(set(string.printable) - set(string.whitespace)) + [" "]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", pair="[BOS] $A [EOS] $B [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=64,
    )
