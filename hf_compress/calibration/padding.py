"""Which tokens of the calibration data count, told from the masks that a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
"""Arguments of a model that tell padding from tokens."""


def key_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The tokens that a mask lets anything be read from.

    Args:
        mask: Rows × tokens, with 0 for padding, or values below 0 where there are any; or rows × queries × tokens, or
            rows × heads × queries × tokens, bool, of zeros and ones, or floating and added to attention scores. A
            single row of these stands for all.
        rows: Rows of the data.

    Returns:
        Rows × tokens, bool; None where there is no mask of that kind.
    """
    if mask is None or not 2 <= mask.ndim <= 4:
        return None
    scores = mask.is_floating_point() and (mask.ndim > 2 or bool((mask < 0).any()))
    kept = _added(mask) if scores else mask != 0
    if mask.ndim == 2:
        return kept
    kept = kept.flatten(1, -2).any(dim=1)
    return kept.expand(rows, -1) if len(kept) == 1 else kept


def _added(mask: Tensor) -> Tensor:
    """What a floating mask of scores lets through: it holds ones for that, or else what a softmax gives weight."""
    return mask > 0 if bool((mask > 0).any()) and not bool((mask < 0).any()) else mask.float().exp() > 0


def row_count(batch: Mapping[str, Tensor]) -> int:
    """Rows of a batch: entries of its ids or embeddings, else of its first tensor. A row may have several images."""
    first = next(iter(batch.values()))
    value = batch.get("input_ids", batch.get("inputs_embeds", first))
    return len(value) if value.ndim else 1


def mask_names(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """Names of the mask of a model's own tokens, and of the mask of what its decoder reads; None where none is given.

    Args:
        model: The model. A decoder inside a model that is no encoder-decoder may read an image, which has no mask.
        batch: Its forward arguments.
    """
    if "encoder_hidden_states" in batch:  # given to a decoder alone
        return "attention_mask", "encoder_attention_mask"
    paired = isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
    if paired or any(name.startswith("decoder_input") for name in batch):
        return "decoder_attention_mask", "attention_mask"
    return "attention_mask", None


def padding_of(batch: Mapping[str, Tensor], name: str | None) -> Tensor | None:
    """What a mask of a batch leaves out, as `key_mask` tells it; None where all tokens count."""
    return None if name is None else hiding(batch.get(name), row_count(batch))


def hiding(mask: Tensor | None, rows: int) -> Tensor | None:
    """What `key_mask` tells of a mask; None where it leaves nothing out."""
    kept = key_mask(mask, rows)
    return None if kept is None or bool(kept.all()) else kept


def spread(mask: Tensor, leading: Sequence[int]) -> Tensor | None:
    """A mask over the leading dimensions of an activation, flattened.

    Args:
        mask: Rows × tokens, bool.
        leading: All dimensions of the activation but the last: rows × tokens × …, tokens × rows × … as in models that
            put time first, or rows and tokens in one.

    Returns:
        As many values as these dimensions hold, bool; None where they are other ones.
    """
    for one in (mask, mask.T):
        if tuple(leading[:2]) == tuple(one.shape):
            return one.reshape(*one.shape, *[1] * (len(leading) - 2)).expand(*leading).reshape(-1)
    return mask.reshape(-1) if tuple(leading) == (mask.numel(),) else None


def fits(mask: Tensor, value: Tensor) -> bool:
    """Whether a mask is one of the rows and tokens of an activation, in either order."""
    return tuple(value.shape[:2]) in (tuple(mask.shape), tuple(mask.T.shape))


def same_memory(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are, or are views of, the same values."""
    return value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def all_of(value: Tensor) -> Tensor:
    """A mask of the rows and tokens of a value, ids or activations, that leaves nothing out."""
    return torch.ones(value.shape[:2], dtype=torch.bool)
