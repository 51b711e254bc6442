"""Second moments of what linear layers and convolutions read: Gram matrices, magnitudes, token counts.

Weights that read the same tensor share one matrix. Only one triangle is accumulated, in panels of columns, which
costs about three quarters of a full product; the other is mirrored at the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import CalibrationError
from ..core.plan import PlanRow
from ..core.weights import WeightKind
from .block import Block, Call

PANELS = 4
"""Panels of columns of the triangle."""

CHUNK = 2048
"""Tokens multiplied at a time: bounds the float32 copy of 16-bit inputs, and the patches of convolutions."""

KINDS = (WeightKind.LINEAR, WeightKind.CONV1D, WeightKind.CONV)
"""Weights whose inputs are collected here."""


@dataclass
class Inputs:
    """What is known of the input of one or more weights.

    Attributes:
        gram: Σ x xᵀ over kept tokens, float32, columns × columns; of a grouped convolution, groups × columns ×
            columns. Complete only after `finish`.
        tokens: Number of kept tokens (of a convolution: positions of its window).
        total: Σ |x| of each column, float32 (columns, or groups × columns); None unless asked for.
        largest: Largest |x| of each column, likewise.
    """

    gram: Tensor
    tokens: int = 0
    total: Tensor | None = None
    largest: Tensor | None = None

    @staticmethod
    def empty(columns: int, groups: int = 1, magnitudes: bool = False) -> Inputs:
        """Nothing seen yet.

        Args:
            columns: Inputs of the weight.
            groups: Of a convolution.
            magnitudes: Whether to collect sums and maxima of absolute values too.
        """
        lead = () if groups == 1 else (groups,)
        made = Inputs(torch.zeros(*lead, columns, columns))
        if magnitudes:
            made.total, made.largest = torch.zeros(*lead, columns), torch.zeros(*lead, columns)
        return made

    @property
    def mean(self) -> Tensor:
        """Mean of |x| of each column, float32."""
        if self.total is None:
            raise ValueError("magnitudes were not collected")
        return self.total / max(1, self.tokens)

    @property
    def dead(self) -> Tensor:
        """Which columns were never other than zero, bool: columns, or groups × columns."""
        return self.gram.diagonal(dim1=-2, dim2=-1) == 0

    def add(self, value: Tensor) -> None:
        """Take some tokens in.

        Args:
            value: Tokens × columns, or groups × tokens × columns; floating, padding left out.
        """
        self.tokens += value.shape[-2]
        for part in value.split(CHUNK, dim=-2):
            wide = part.float()
            if wide.ndim == 2:
                _add_panels(self.gram, wide)
            else:
                self.gram.baddbmm_(wide.transpose(-1, -2), wide)
            if self.total is not None and self.largest is not None:
                size = wide.abs()
                self.total += size.sum(-2)
                torch.maximum(self.largest, size.amax(-2), out=self.largest)

    def finish(self, names: str) -> None:
        """Mirror the triangle.

        Args:
            names: The layers that read it, for the message.

        Raises:
            CalibrationError: An input was NaN or infinite, or so large that its square is.
        """
        if self.gram.ndim == 2:
            for start, stop in _panels(self.gram.shape[-1]):
                self.gram[:start, start:stop] = self.gram[start:stop, :start].T
                square = self.gram[start:stop, start:stop]
                square.copy_(square.tril().add_(square.tril(-1).T))
        bad = int((~self.gram.diagonal(dim1=-2, dim2=-1).isfinite()).sum())
        if bad:
            raise CalibrationError(
                f"The inputs of {names} hold NaN or infinite values, or values whose squares overflow float32, in "
                f"{bad} of {self.gram.shape[-1]} columns.",
                'load the model with dtype="float32", or look for the row of the calibration data that causes it',
            )


def _panels(columns: int) -> list[tuple[int, int]]:
    """Bounds of the panels."""
    step = -(-columns // PANELS)
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def _add_panels(gram: Tensor, value: Tensor) -> None:
    """The lower triangle, in panels of rows up to the diagonal block's end."""
    for start, stop in _panels(gram.shape[-1]):
        gram[start:stop, :stop].addmm_(value[:, start:stop].T, value[:, :stop])


def patches(module: nn.Module, value: Tensor) -> Tensor:
    """What each window of a convolution sees.

    Args:
        module: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with any stride, dilation, padding and groups.
        value: Batch × channels × …, or without the batch.

    Returns:
        Windows × columns, or groups × windows × columns where it has several groups. Columns are ordered as the
        flattened weight's.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"{type(module).__name__} is no convolution")
    sizes = module.kernel_size
    value = value if value.ndim == len(sizes) + 2 else value.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(value, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(sizes, module.stride, module.dilation, strict=True)):
        padded = padded.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    spatial, count = len(sizes), module.groups
    split = padded.unflatten(1, (count, -1))
    order = (1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    windows = split.permute(order).flatten(1, 1 + spatial).flatten(2)
    return windows[0] if count == 1 else windows


def tokens_of(module: nn.Module, call: Call, value: Tensor) -> Tensor:
    """The input of a linear layer or convolution as tokens × columns (groups × windows × columns), without padding."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return patches(module, value)
    return call.tokens(value)


def empty_for(module: nn.Module, row: PlanRow, magnitudes: bool = False) -> Inputs:
    """Nothing seen yet of what a row's module reads."""
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return Inputs.empty(row.shape[-1], groups, magnitudes)


class _Irregular(Exception):
    """Weights that shared an input in the first call don't in a later one."""


@dataclass
class _Reader:
    """A module with planned weights.

    Attributes:
        row: One of its rows.
        module: The module.
        inputs: Its own statistics, where it leads.
        leader: Path of the module whose statistics it shares; its own where it leads.
        reads: Calls of it so far.
    """

    row: PlanRow
    module: nn.Module
    leader: str
    inputs: Inputs | None = None
    reads: int = 0


@dataclass
class _Collector:
    """Forward pre-hooks on the modules that own planned weights.

    A tensor is told by its identity while it is alive. What shares an input in the first call has to in every call,
    and as often; otherwise all is collected again without sharing.
    """

    magnitudes: bool
    share: bool
    readers: dict[str, _Reader]
    call: Call | None = None
    learning: bool = True
    seen: dict[int, tuple[weakref.ref[Tensor], str, set[str]]] = field(default_factory=dict)

    def hook(self, path: str, value: Tensor) -> None:
        """A module is about to read a tensor."""
        reader = self.readers[path]
        reader.reads += 1
        known = self.seen.get(id(value)) if self.share else None
        if known is not None and known[0]() is value and path not in known[2] and self._joins(reader, known[1]):
            known[2].add(path)
            return
        if reader.leader != path:
            raise _Irregular
        if self.share:
            self.seen[id(value)] = (weakref.ref(value), path, {path})
        if reader.inputs is None:
            reader.inputs = empty_for(reader.module, reader.row, self.magnitudes)
        if self.call is not None:
            reader.inputs.add(tokens_of(reader.module, self.call, value))

    def _joins(self, reader: _Reader, leader: str) -> bool:
        """Whether a module shares the statistics of another one; learnt in the first call."""
        plain = not isinstance(reader.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if self.learning and reader.inputs is None and plain:
            reader.leader = leader
        return reader.leader == leader != reader.row.module

    def run(self, module: nn.Module, call: Call) -> None:
        """One call of the block."""
        self.call = call
        self.seen.clear()
        call.run(module)
        self.seen.clear()
        self.learning = False
        if any(reader.reads != self.readers[reader.leader].reads for reader in self.readers.values()):
            raise _Irregular


def owners(block: Block, rows: Iterable[PlanRow], kinds: Sequence[WeightKind] = KINDS) -> dict[str, PlanRow]:
    """The first row of each module that owns weights of some kinds, by the module's path in the model."""
    found: dict[str, PlanRow] = {}
    for row in rows:
        if row.kind in kinds:
            found.setdefault(row.module, row)
    return found


@torch.no_grad()
def collect(block: Block, rows: Iterable[PlanRow] | None = None, magnitudes: bool = False) -> dict[str, Inputs]:
    """Run all calls of a block and gather what its weights read. Nothing is changed.

    Args:
        block: The block.
        rows: Weights to look at, all of the block's by default. Those of other kinds than linear, Conv1D and
            convolutions are left out.
        magnitudes: Whether to collect `mean` and `largest` too.

    Returns:
        Statistics by the names of the rows; rows that read the same tensor share one object. A module that was never
        called has zero tokens.

    Raises:
        CalibrationError: An input is NaN or infinite; names the layers.
    """
    chosen = tuple(block.rows if rows is None else rows)
    found = owners(block, chosen)
    try:
        readers = _collected(block, found, magnitudes, share=True)
    except _Irregular:
        readers = _collected(block, found, magnitudes, share=False)
    for path, reader in readers.items():
        if reader.leader == path:
            reader.inputs = reader.inputs or empty_for(reader.module, reader.row, magnitudes)
            reader.inputs.finish(", ".join(name for name, one in readers.items() if one.leader == path))
    made = {path: readers[reader.leader].inputs for path, reader in readers.items()}
    return {row.name: inputs for row in chosen if (inputs := made.get(row.module)) is not None}


def _collected(block: Block, found: dict[str, PlanRow], magnitudes: bool, share: bool) -> dict[str, _Reader]:
    """One pass over the calls, with or without sharing."""
    readers = {path: _Reader(row, block.owner(row), path) for path, row in found.items()}
    collector = _Collector(magnitudes, share, readers)

    def hook(path: str) -> Any:
        return lambda module, args, kwargs: collector.hook(path, input_of(args, kwargs))

    handles = [
        reader.module.register_forward_pre_hook(hook(path), with_kwargs=True) for path, reader in readers.items()
    ]
    try:
        for call in block.calls:
            collector.run(block.module, call)
    finally:
        for handle in handles:
            handle.remove()
    return readers


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module was called with: the first argument, or the only keyword."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, Tensor):
        raise CalibrationError(
            f"A linear layer was called with {type(value).__name__} instead of a tensor.", "skip its weight"
        )
    return value
