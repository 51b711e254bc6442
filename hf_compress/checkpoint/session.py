"""What a load in progress shares with transformers' loader: the plan, how to pack, what happened.

transformers deep-copies quantizers hundreds of times while loading and swallows exceptions raised inside its
conversion operations, so results and typed errors are collected here, in one object that copies by reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..core.errors import HFCompressError, IncompleteLoadError, listed
from ..core.plan import Plan, PlanRow
from ..modules.packed import PackedTensor
from ..modules.swap import pack_module

Packer = Callable[[PlanRow, Tensor], tuple[PackedTensor, float | None]]


@dataclass
class LoadSession:
    """One load.

    Attributes:
        plan: The plan to carry out.
        packer: Turns the tensor that the loader hands over into a packed weight and its noise in dB.
        progress: Called with the number of weights done and the number planned.
        sqnr: Noise of each packed weight, by name.
        failures: Typed errors, in the order they happened.
    """

    plan: Plan
    packer: Packer
    progress: Callable[[int, int], None] | None = None
    sqnr: dict[str, float | None] = field(default_factory=dict)
    failures: list[HFCompressError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = {row.key: row for row in self.plan.quantized}

    def __deepcopy__(self, memo: dict[int, object]) -> LoadSession:
        return self

    def receive(self, model: nn.Module, key: str, value: Tensor) -> None:
        """Pack one weight and put it into its module; a typed error is kept for `finish`."""
        row = self.rows[key]
        try:
            packed, self.sqnr[row.name] = self.packer(row, value)
        except HFCompressError as error:
            self.failures.append(error)
            return
        pack_module(model.get_submodule(row.module), row.parameter, packed)
        if self.progress is not None:
            self.progress(len(self.sqnr), len(self.rows))

    def finish(self) -> None:
        """Raise what went wrong.

        Raises:
            HFCompressError: The first failure, with the number of others.
            IncompleteLoadError: The checkpoint lacks planned weights.
        """
        if self.failures:
            first, *others = self.failures
            raise type(first)(first.message + (f" ({len(others)} more like this.)" if others else ""), first.fix)
        missing = [row.name for row in self.plan.quantized if row.name not in self.sqnr]
        if missing:
            raise IncompleteLoadError(
                f"{len(missing)} planned weights are not in the checkpoint: {listed(missing)}. They would be random.",
                f'load a checkpoint that has them, or keep them with skip=["{missing[0]}"]',
            )
