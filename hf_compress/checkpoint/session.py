"""What a load in progress shares with transformers' loader: the plan, how to pack, what happened.

transformers deep-copies quantizers hundreds of times while loading and swallows exceptions raised inside its
conversion operations, so results and typed errors are collected here, in one object that copies by reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import HFCompressError, IncompleteLoadError, TiedWeightsError, listed
from ..core.plan import Plan, PlanRow
from ..modules.packed import PackedTensor
from ..modules.swap import pack_module, packed_tensor, share_packed

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
        arrived: The row whose tensor each packed weight was made of, by the name of its source.
    """

    plan: Plan
    packer: Packer
    progress: Callable[[int, int], None] | None = None
    sqnr: dict[str, float | None] = field(default_factory=dict)
    failures: list[HFCompressError] = field(default_factory=list)
    arrived: dict[str, PlanRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {row.key: row for row in self.plan.quantized}
        self.sources = {row.name: row for row in self.plan.quantized if row.tied_to is None}

    def __deepcopy__(self, memo: dict[int, object]) -> LoadSession:
        return self

    def receive(self, model: nn.Module, key: str, value: Tensor) -> None:
        """Pack one weight and put it into its module; a typed error is kept for `finish`."""
        source, *_ = group = self.group(key)
        try:
            packed, noise = self.packer(source, value)
            if source.name in self.sqnr:
                _check_same(self.rows[key], self.arrived[source.name], packed, model)
                return
        except HFCompressError as error:
            self.failures.append(error)
            return
        place(model, self.plan, source, packed)
        self.arrived[source.name] = self.rows[key]
        self.sqnr |= dict.fromkeys((row.name for row in group), noise)
        if self.progress is not None:
            self.progress(len(self.sqnr), len(self.rows))

    def group(self, key: str) -> tuple[PlanRow, ...]:
        """The row that owns the weight of a key, and the rows that are tied to it."""
        source = self.sources[self.rows[key].tied_to or self.rows[key].name]
        return (source, *self.plan.followers.get(source.name, ()))

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


def place(model: nn.Module, plan: Plan, row: PlanRow, packed: PackedTensor) -> None:
    """Put a packed weight into its module, and into all modules that are tied to it."""
    module = model.get_submodule(row.module)
    pack_module(module, row.parameter, packed)
    for other in plan.followers.get(row.name, ()):
        share_packed(module, row.parameter, model.get_submodule(other.module), other.parameter)


def release_ties(model: nn.Module, plan: Plan) -> None:
    """Take quantized ties out of transformers' hands: they are packed buffers, which it can't tie again."""
    if isinstance(model, PreTrainedModel):
        for rows in plan.followers.values():
            for row in rows:
                model.all_tied_weights_keys.pop(row.key, None)


def _check_same(row: PlanRow, other: PlanRow, packed: PackedTensor, model: nn.Module) -> None:
    """Compare a tied weight with the one that came before it.

    Raises:
        TiedWeightsError: They differ.
    """
    earlier = packed_tensor(model.get_submodule(other.module), other.parameter)
    if not (torch.equal(packed.codes, earlier.codes) and torch.equal(packed.scale, earlier.scale)):
        raise TiedWeightsError(
            f"The checkpoint holds other values for {row.name} than for {other.name}; its config ties the two.",
            f'load it with tie_word_embeddings=False, or keep both: skip=["{row.name}", "{other.name}"]',
        )
