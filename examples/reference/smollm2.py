"""SmolLM2-135M from its packaged GGUF file: as packaged, and rotated off the INT4 grid it lies on.

The packaged weights are multiples of an INT4 step per group, so INT4 rounding at that group size looks
lossless. Rotating the residual stream leaves the function as it is and takes the weights off the grid, which
makes the model a fair floating-point reference for 4-bit methods. The rotation also spreads outliers: name
the model "SmolLM2-135M, rotated" next to any figure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from examples.reference.cache import build_once
from examples.reference.packages import SMOLLM2, ReferenceUnavailable, smollm2_gguf

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REFERENCE_FILE = "reference.json"
NAME = "SmolLM2-135M"
ROTATED_NAME = "SmolLM2-135M, rotated"
ROTATION_SEED = 0
LOGIT_TOLERANCE = 1e-4
"""Largest change of a logit by the rotation, relative to the largest logit, in fp32."""
PROBE = "The quick brown fox jumps over the lazy dog. A list in Python is a mutable sequence of objects."

_REVISION = 1  # change it when what is saved changes
_log = logging.getLogger(__name__)


def plain_smollm2() -> Path:
    """SmolLM2-135M-Instruct as packaged, dequantised from Q4_1 on first use.

    Returns:
        A folder of the user cache with the fp32 model (embeddings tied) and its tokenizer. Its weights lie on
        an INT4 grid: don't measure the quality of 4-bit methods on it.

    Raises:
        ReferenceUnavailable: The package, or `gguf` to read it with, can't be had.
    """
    return build_once(_cache_name("plain"), _save_plain)


def off_grid_smollm2() -> Path:
    """SmolLM2-135M, rotated: the same function with weights off the INT4 grid.

    Returns:
        A folder of the user cache with the fp32 model (embeddings untied) and its tokenizer, and
        `reference.json` with the measured change of the logits.

    Raises:
        ReferenceUnavailable: The package, or `gguf` to read it with, can't be had, or the rotated model does
            not compute the same logits.
    """
    return build_once(_cache_name("rotated"), _save_rotated)


@torch.no_grad()
def rotate_residual_stream(model: LlamaForCausalLM, seed: int = ROTATION_SEED) -> None:
    """Rotate the residual stream of a Llama-type model in place, keeping the function it computes.

    Norm weights are folded into the linear layers that read the normed stream (an RMS norm without weights
    commutes with a rotation); then layers that read the stream and the embedding are multiplied by the
    rotation, layers that write it by its transpose (SliceGPT, Ashkboos et al. 2024, section 3.1). Tied
    embeddings become untied. All products are computed in fp64.

    Args:
        model: A Llama-type causal language model without biases, in fp32.
        seed: Seed of the random orthogonal matrix; the global generators are not used.

    Raises:
        ValueError: A layer that the rotation touches has a bias.
    """
    base = model.model
    _refuse_biases(model)
    rotation = _random_rotation(model.config.hidden_size, seed).to(base.embed_tokens.weight.device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(base.embed_tokens.weight.detach().clone())
        model.config.tie_word_embeddings = False
    embedding = base.embed_tokens.weight
    embedding.copy_(embedding.double() @ rotation)
    _rotate_readers(base.norm.weight, [model.lm_head.weight], rotation)
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention_readers = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        _rotate_readers(layer.input_layernorm.weight, attention_readers, rotation)
        mlp_readers = [mlp.gate_proj.weight, mlp.up_proj.weight]
        _rotate_readers(layer.post_attention_layernorm.weight, mlp_readers, rotation)
        for writer in (attention.o_proj.weight, mlp.down_proj.weight):
            writer.copy_(rotation.T @ writer.double())


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest absolute difference of two tensors, relative to the largest absolute value of the first."""
    return float((after - before).abs().max() / before.abs().max())


def _cache_name(variant: str) -> str:
    content = json.dumps([str(SMOLLM2), SMOLLM2.sha256, _REVISION, ROTATION_SEED])
    return f"smollm2-135m-{variant}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _save_plain(folder: Path) -> None:
    gguf = smollm2_gguf()
    started = time.perf_counter()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ReferenceUnavailable(NAME, str(error)) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_record(folder, {"rotated": False, "seconds": round(time.perf_counter() - started, 1)})


def _save_rotated(folder: Path) -> None:
    source = plain_smollm2()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(PROBE, return_tensors="pt")
    with torch.inference_mode():
        before = model(**inputs).logits
    rotate_residual_stream(model)
    with torch.inference_mode():
        change = relative_change(before, model(**inputs).logits)
    _log.info("%s: relative change of the logits %.1e", ROTATED_NAME, change)
    if not change <= LOGIT_TOLERANCE:
        reason = f"the rotation changed its logits by {change:.1e} (allowed: {LOGIT_TOLERANCE:.0e})"
        raise ReferenceUnavailable(ROTATED_NAME, reason)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = round(time.perf_counter() - started, 1)
    _save_record(folder, {"rotated": True, "seed": ROTATION_SEED, "logit_change": change, "seconds": seconds})


def _save_record(folder: Path, facts: dict[str, object]) -> None:
    record = {"package": str(SMOLLM2), "license": "Apache-2.0", **facts}
    (folder / REFERENCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _random_rotation(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return torch.as_tensor(factors[0])


def _rotate_readers(norm: torch.Tensor, readers: Iterable[torch.Tensor], rotation: torch.Tensor) -> None:
    for reader in readers:
        reader.copy_((reader.double() * norm.double()) @ rotation)
    norm.fill_(1)


def _refuse_biases(model: LlamaForCausalLM) -> None:
    biased = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if biased:
        message = f"only models without biases can be rotated, this one has {len(biased)}: {biased[0]}, ..."
        raise ValueError(message)
