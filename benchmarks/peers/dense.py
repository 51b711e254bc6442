"""Any tool's checkpoint as dense weights in the stock fp32 model, so that all are measured by one program.

Layouts of other tools are decoded here, from their specification and not with our own readers, which are under test
elsewhere: compressed-tensors `pack-quantized`, and GPTQ's (v1: stored zero points are one less).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress as hfc
from hf_compress.modules.swap import packed_modules

WORD = 32


@torch.no_grad()
def dense_model(checkpoint: Path, original: Path, ours: bool) -> PreTrainedModel:
    """The stock fp32 model with the weights that a checkpoint holds.

    Args:
        checkpoint: What a tool wrote.
        original: The model that it compressed.
        ours: Whether hf_compress wrote it; it is then loaded by `hfc.load`, which proves all names.

    Raises:
        ValueError: A weight has another shape than the model's, or none of the checkpoint's tensors.
    """
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    found = dict(our_weights(checkpoint) if ours else their_weights(checkpoint))
    names = {name for name, _ in model.named_parameters()}
    if set(found) != names:
        raise ValueError(f"weights that differ: {sorted(set(found) ^ names)[:5]}")
    for name, parameter in model.named_parameters():
        if found[name].shape != parameter.shape:
            raise ValueError(f"{name}: {tuple(found[name].shape)} instead of {tuple(parameter.shape)}")
        parameter.copy_(found[name])
    return model


def our_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of a checkpoint of hf_compress as they take part in the forward, packed ones dequantized."""
    model = hfc.load(checkpoint)
    yield from model.named_parameters()
    for path, module in packed_modules(model):
        for parameter in module.hfc_layouts:
            yield f"{path}.{parameter}", getattr(module, parameter)


def their_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of another tool's checkpoint by the model's names, dequantized in fp32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            yield f"{path}.weight", unpack_compressed_tensors(path, tensors, config)
        elif leaf == "qweight":
            yield f"{path}.weight", unpack_gptq(path, tensors, config)
        elif leaf in ("weight", "bias"):
            yield name, tensors[name].float()


def unpack_compressed_tensors(path: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """A symmetric `pack-quantized` weight: rows × columns."""
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    rows, columns = tensors[f"{path}.weight_shape"].tolist()
    packed = tensors[f"{path}.weight_packed"]
    each = WORD // bits  # codes do not cross words in this layout
    codes = (packed.unsqueeze(-1) >> (bits * torch.arange(each, dtype=torch.int32))) & (2**bits - 1)
    centred = codes.reshape(rows, -1)[:, :columns].float() - 2 ** (bits - 1)
    scale = tensors[f"{path}.weight_scale"].float()
    return centred * scale.repeat_interleave(columns // scale.shape[1], dim=1)


def unpack_gptq(path: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """A weight in GPTQ's layout: rows × columns."""
    bits = config["bits"]
    codes = bit_stream(tensors[f"{path}.qweight"].T, bits).T  # columns × rows
    lower = 0 if config.get("checkpoint_format", "gptq") == "gptq_v2" else 1
    zeros = bit_stream(tensors[f"{path}.qzeros"], bits) + lower  # groups × rows
    groups = tensors[f"{path}.g_idx"].long()
    return ((codes - zeros[groups]).float() * tensors[f"{path}.scales"].float()[groups]).T


def bit_stream(packed: Tensor, bits: int) -> Tensor:
    """Codes of any width from words that they lie in one after the other, lowest bits first.

    Args:
        packed: … × words, int32.
        bits: Of each code.

    Returns:
        … × codes, int32.
    """
    single = (packed.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32)) & 1
    whole = single.reshape(*packed.shape[:-1], -1, bits)
    return (whole << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def quantized_linears(model: nn.Module, original: nn.Module) -> int:
    """How many linear layers differ from the original."""
    other = dict(original.named_parameters())
    return sum(
        not torch.equal(parameter, other[name])
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    )
