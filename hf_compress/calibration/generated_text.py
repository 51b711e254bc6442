"""Calibration text that a language model writes itself (LLM-QAT, arXiv:2305.17888, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.config import Calibration
from ..core.errors import CalibrationError
from .data_model import arguments, config_int, generates, main_input, takes_decoder_inputs
from .data_text import around, row_length
from .modes import evaluating
from .processors import Source, find

GREEDY = 4
"""Tokens after the first one that are the most likely ones; the paper takes three to five."""

AT_ONCE = 32
"""Rows that are written together."""


def samples(model: nn.Module) -> bool:
    """Whether a model continues text by itself."""
    return generates(model) and main_input(model) == "input_ids" and not takes_decoder_inputs(model)


@torch.no_grad()
def generated_tokens(model: nn.Module, request: Calibration, source: Source) -> list[list[int]]:
    """Rows of tokens sampled from the model.

    The first one is drawn evenly from the vocabulary, without the special ones; the next few are the most likely
    ones, so that the row starts sensibly; the others are drawn from the model's probabilities at temperature 1.
    What the tokenizer puts before every text, where there is one, comes first.

    Args:
        model: A live decoder; it is not changed.
        request: `rows`, `sequence_length` and `seed`.
        source: Where its tokenizer is, if not at its own place.

    Returns:
        `rows` rows of `sequence_length` ids.

    Raises:
        CalibrationError: A logit is not finite, or the model has fewer positions than asked for.
    """
    if not isinstance(model, PreTrainedModel):
        raise CalibrationError(f"{type(model).__name__} writes no text.", "calibration=[...] with texts")
    tokenizer = find(PreTrainedTokenizerBase, request, model, source)
    length = row_length(request, model, tokenizer)
    before = around(tokenizer)[0] if tokenizer is not None else []
    generator = torch.Generator().manual_seed(request.seed)
    allowed = _ordinary(model, tokenizer)
    rows: list[list[int]] = []
    with evaluating(model):
        for start in range(0, request.rows, AT_ONCE):
            count = min(AT_ONCE, request.rows - start)
            first = allowed[torch.randint(len(allowed), (count, 1), generator=generator)]
            head = torch.cat([torch.tensor([before] * count, dtype=torch.int64).reshape(count, -1), first], dim=1)
            rows += _continued(model, head, length, generator).tolist()
    return rows


def _continued(model: PreTrainedModel, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Rows continued to a length, rows × length."""
    cached = "past_key_values" in arguments(model)
    start = ids.shape[1]
    cache: Any = None
    while ids.shape[1] < length:
        options = {"past_key_values": cache, "use_cache": True} if cached else {}
        output = model(input_ids=(ids if cache is None else ids[:, -1:]).to(model.device), **options)
        cache = output.past_key_values if cached else None
        logits = output.logits[:, -1].float().cpu()
        if not bool(logits.isfinite().all()):
            raise CalibrationError(
                f"{type(model).__name__} gives logits that are not finite, so it can't write calibration text.",
                'load it with dtype="float32", or pass texts',
            )
        following = (
            logits.argmax(dim=-1, keepdim=True)
            if ids.shape[1] - start < GREEDY
            else torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        )
        ids = torch.cat([ids, following], dim=1)
    return ids[:, :length]


def _ordinary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids that a text may start with."""
    config = model.config.get_text_config()
    named = [config_int(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    left_out = {value for value in named if value is not None}
    if tokenizer is not None:
        left_out |= set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(size) if token not in left_out])
