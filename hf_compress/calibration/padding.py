"""Which tokens of the calibration data count, told from the masks that a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def key_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The tokens that a mask lets anything be read from.

    Args:
        mask: Rows × tokens, with 0 for padding; or rows × queries × tokens, or rows × heads × queries × tokens, bool,
            of zeros and ones, or floating and added to attention scores. A single row stands for all.
        rows: Rows of the data.

    Returns:
        Rows × tokens, bool; None where there is no mask of that kind.
    """
    if mask is None or not 2 <= mask.ndim <= 4:
        return None
    kept = mask != 0
    if mask.ndim > 2:
        kept = (_added(mask) if mask.is_floating_point() else kept).flatten(1, -2).any(dim=1)
    return kept.expand(rows, -1) if len(kept) == 1 else kept


def _added(mask: Tensor) -> Tensor:
    """What a floating mask of scores lets through: it holds ones for that, or else what a softmax gives weight."""
    return mask > 0 if bool((mask > 0).any()) and not bool((mask < 0).any()) else mask.float().exp() > 0


def padding_of(batch: Mapping[str, Tensor], name: str) -> Tensor | None:
    """What a mask of a batch leaves out, as `key_mask` tells it; None where all tokens count."""
    rows = max((len(value) for value in batch.values() if value.ndim), default=1)
    kept = key_mask(batch.get(name), rows)
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


def same_memory(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are, or are views of, the same values."""
    return value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def all_of(value: Tensor) -> Tensor:
    """A mask of the rows and tokens of a value, ids or activations, that leaves nothing out."""
    return torch.ones(value.shape[:2], dtype=torch.bool)
