"""One block of a model in the sequential pass, and the contract of what compresses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.plan import PlanRow
from ..core.registry import Quantized
from ..modules.packed import PackedTensor, layout_of
from ..modules.results import canonical, pack_result
from .padding import same_memory, spread


@dataclass
class Call:
    """The arguments of one call of a block: some rows of the calibration data.

    Attributes:
        hidden: What the block works on, batch × tokens × features (or any shape); the output of the block before it.
            None where the block is the whole model, whose inputs are in `kwargs`.
        name: Name of the argument `hidden`; None where it is the first positional one.
        args: The other positional arguments.
        kwargs: The keyword arguments.
        mask: Which tokens count, batch × tokens, bool; None where all do. Where there is `memory`, it is always set.
        memory: What a decoder reads of its encoder, batch × memory tokens × features, or None.
        memory_mask: Which of those count, batch × memory tokens, bool; None where all do.
        reference: What the uncompressed model has here instead of `hidden`; None unless the method asked for it.
        target: What the uncompressed block makes of `reference`; None unless the method asked for it.
    """

    hidden: Tensor | None
    name: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    reference: Tensor | None = None
    target: Tensor | None = None

    def run(self, module: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Call a block.

        Args:
            module: The block.
            hidden: Instead of the call's own.

        Returns:
            The block's output, or the first tensor of it.
        """
        value = self.hidden if hidden is None else hidden
        if value is None:
            return first_tensor(module(*self.args, **self.kwargs))
        if self.name is not None:
            return first_tensor(module(*self.args, **{**self.kwargs, self.name: value}))
        return first_tensor(module(value, *self.args, **self.kwargs))

    def tokens(self, value: Tensor) -> Tensor:
        """An input of a layer inside the block as tokens × features, padding left out.

        Args:
            value: … × features. Rows are told from padding by the leading dimensions: those of `mask`, flat or not, or
                with tokens first, or those of what the decoder reads of its encoder. Others, such as a pooler's, have
                no tokens to leave out.
        """
        flat = value.reshape(-1, value.shape[-1])
        for mask in self.masks(value):
            kept = None if mask is None else spread(mask, value.shape[:-1])
            if kept is not None:
                return flat[kept]
        return flat

    def masks(self, value: Tensor) -> tuple[Tensor | None, ...]:
        """The masks that an input may have, the likelier first."""
        if self.memory is not None and same_memory(value, self.memory):
            return (self.memory_mask,)
        return (self.mask, self.memory_mask)


def first_tensor(output: Any) -> Tensor:
    """A tensor, or the first one of a tuple or of a `ModelOutput`."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


@dataclass
class Finished:
    """What became of one block.

    Attributes:
        packed: Packed weights by the names of their rows.
        sqnr: Their noise in dB, None where exact.
        changed: New values of parameters and buffers that stay dense, by their names in the model.
    """

    packed: dict[str, PackedTensor] = field(default_factory=dict)
    sqnr: dict[str, float | None] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Block:
    """One block, dense and in memory, with everything that reaches it.

    The module is a copy that the method may change as it likes; what counts are `install` and `change`.

    Attributes:
        index: Number of the block in the order of the pass, from 0.
        path: The module's path in the model; empty for the whole model.
        module: The block, dense, in evaluation mode. Values of finished weights are already the compressed ones.
        rows: Rows of the plan to quantize, in module order, ties left out.
        calls: The calls of the block, a few rows of data each; all rows of a call have the same length.
        finished: What became of it.
        advanced: Whether the calls' `hidden` is already the output of this block, or nothing needs it.
        seed: Seed for whatever is drawn while compressing it.
        progress: Called once per installed weight.
        writes: Whether installed weights are put into the module; false where nothing reads them there.
        shared: Names in the model of the block's parameters and buffers that modules outside of it own too. They are
            not to be changed, but for installing compressed weights: the others would change with them.
    """

    index: int
    path: str
    module: nn.Module
    rows: tuple[PlanRow, ...]
    calls: list[Call]
    seed: int = 0
    progress: Callable[[], None] = lambda: None
    writes: bool = True
    shared: frozenset[str] = frozenset()
    finished: Finished = field(default_factory=Finished)
    advanced: bool = False

    def owner(self, row: PlanRow) -> nn.Module:
        """The module that owns a row's weight."""
        return self.module.get_submodule(self.local(row.module))

    def weight(self, row: PlanRow) -> Tensor:
        """A row's dense weight as it is now, in canonical orientation: … × rows × columns."""
        return canonical(self.owner(row).get_parameter(row.parameter).detach(), layout_of(row))

    def local(self, name: str) -> str:
        """A name in the model as a name in the block."""
        return name if not self.path else name.removeprefix(self.path).removeprefix(".")

    @torch.no_grad()
    def install(self, row: PlanRow, quantized: Quantized) -> None:
        """Take a weight's result, and put its dequantized values into the module.

        Noise is measured against the weight as it is in the module, so after scales were folded into it.

        Raises:
            WeightValueError: Its scales, or codes times scales, are not finite.
        """
        packed, noise = pack_result(row, self.weight(row), quantized)
        self.finished.packed[row.name] = packed
        self.finished.sqnr[row.name] = noise
        if self.writes:
            self.owner(row).get_parameter(row.parameter).data.copy_(packed.dense())
        self.progress()

    @torch.no_grad()
    def rewrite(self, row: PlanRow, parameter: Tensor) -> None:
        """Give a weight other dense values before it is quantized, such as with a scale folded in.

        Args:
            row: Its row of the plan.
            parameter: The new values, in the module's own orientation; stored in its data type.
        """
        self.owner(row).get_parameter(row.parameter).data.copy_(parameter)

    @torch.no_grad()
    def change(self, name: str, value: Tensor) -> None:
        """Change a parameter or buffer that stays dense, such as a norm's weight or a bias.

        A weight that is to be quantized is changed by `rewrite`; only its result counts.

        Args:
            name: Its name in the model.
            value: Its new values, of the same shape; stored in its data type.
        """
        local, _, leaf = self.local(name).rpartition(".")
        owner = self.module.get_submodule(local)
        target = {**owner._parameters, **owner._buffers}.get(leaf)
        if target is None:
            raise ValueError(f"{name} is no parameter or buffer of this block")
        target.data.copy_(value)
        self.finished.changed[name] = target.detach().clone()

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the calls' `hidden` by the output of the module as it is now."""
        for call in self.calls:
            output = call.run(self.module)
            if call.hidden is not None:
                call.hidden = output
        self.advanced = True


class Compressor(Protocol):
    """What a method does with one block after the other."""

    @property
    def reference(self) -> bool:
        """Whether calls carry `reference` and `target`, at the price of a second pass."""

    @property
    def sequential(self) -> bool:
        """Whether blocks must see what the compressed ones before them give.

        If not, a live model is compressed as one block whose calls hold nothing between them.
        """

    @property
    def call_tokens(self) -> int:
        """Most tokens of one call that suits it; batches of longer ones are split as far as rows allow."""

    def compress(self, block: Block) -> None:
        """Install all rows of a block. It is advanced afterwards, unless the method has done so itself."""
