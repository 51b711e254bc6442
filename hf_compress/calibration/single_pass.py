"""Walking through a block once, with all calibration data side by side, and stopping before each stage of its weights.

All calls are brought to the first module with planned weights; what it reads is gathered, its weights are compressed;
all calls go on with the compressed ones to the next. So every operation is done once, each weight sees what the
compressed ones before it give (the "true sequential" order of GPTQ), and only values that are still to be read are
kept: those that a stage reads as float16 where they were float32, everything else as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.plan import PlanRow
from ..core.weights import WeightKind
from .block import Block, Call
from .experts import ExpertInputs
from .gram import Inputs, empty_for, tokens_of
from .heap import give_back
from .held import Held, Slabs
from .tape import HIDDEN, Pause, Tape, UnsuitableBlockError, record, signature

CALLS = 2
"""Calls after which memory is given back."""

__all__ = ["Stage", "UnsuitableBlockError", "single_pass"]


@dataclass(frozen=True)
class Stage:
    """Weights whose inputs are known.

    Attributes:
        rows: The weights.
        inputs: Statistics by the names of rows; rows that read the same tensor share one object.
        experts: What experts modules read, by their paths.
    """

    rows: tuple[PlanRow, ...]
    inputs: dict[str, Inputs]
    experts: dict[str, ExpertInputs]


@dataclass
class _Walk:
    """A call on its way through the block.

    Attributes:
        call: The call.
        tape: What it computes.
        values: What is still needed.
        position: Nodes that are done.
        outside: Values that were given to the block.
        settled: Values that lie where they stay.
    """

    call: Call
    tape: Tape
    values: dict[int, Tensor | Held]
    position: int = 0
    outside: frozenset[int] = field(default_factory=frozenset)
    settled: set[int] = field(default_factory=set)

    def go(self, position: int) -> None:
        """Go on to a node. The call's own activations are let go when nothing reads them any more."""
        self.tape.run(self.values, self.position, position)
        self.position = position
        if self.tape.slots[HIDDEN] not in self.values and self.call.hidden is not None:
            self.call.hidden = self.call.hidden.new_empty(0)

    def hold(self, index: int, slabs: Slabs) -> Held:
        """What a stage reads, kept in half the memory where it is the block's own."""
        value = self.values[index]
        held = value if isinstance(value, Held) else Held.of(value, slabs)
        if index not in self.outside:
            self.values[index] = held
        return held

    def settle(self, slabs: Slabs) -> None:
        """Move everything else that waits into lasting memory, but for views and what was given to the block."""
        for index, value in self.values.items():
            if index in self.outside or index in self.settled or not isinstance(value, Tensor):
                continue
            if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes:
                self.values[index] = slabs.copy(value)
            self.settled.add(index)


@torch.no_grad()
def single_pass(block: Block, rows: Sequence[PlanRow], solve: Callable[[Stage], None]) -> None:
    """Walk through a block and leave it advanced; where it is said to be so already, stop after the last weight.

    Args:
        block: The block.
        rows: Its linear, Conv1D, convolution and experts weights to stop for.
        solve: Compresses the weights of one stage and puts them into the module.

    Raises:
        UnsuitableBlockError: The block can't be walked in pieces. Nothing was changed.
        CalibrationError: Inputs are not finite; names the layers.
    """
    tapes: dict[Any, Tape] = {}
    signatures = [signature(call) for call in block.calls]
    for call, kind in zip(block.calls, signatures, strict=True):
        if kind not in tapes:
            tapes[kind] = record(block, rows, call)
    structure = tapes[signatures[0]].structure
    if any(tape.structure != structure for tape in tapes.values()):
        raise UnsuitableBlockError("its modules run in another order in other calls")
    walks = [_walk(call, tapes[kind]) for call, kind in zip(block.calls, signatures, strict=True)]
    for number in range(len(structure)):
        solve(_stage(block, rows, walks, number))
        give_back()
    if not block.advanced:
        _finish(walks)
        block.advanced = True


def _finish(walks: Sequence[_Walk]) -> None:
    """Bring all calls to the end of the block."""
    slabs = Slabs()
    for index, walk in enumerate(walks):
        walk.go(len(walk.tape.nodes))
        output = walk.values.pop(walk.tape.output)
        walk.call.hidden = slabs.copy(output.restore() if isinstance(output, Held) else output)
        _tidy(index)


def _tidy(index: int) -> None:
    """Give memory back now and then."""
    if index % CALLS == CALLS - 1:
        give_back()


def _walk(call: Call, tape: Tape) -> _Walk:
    """A call at its start."""
    return _Walk(call, tape, tape.start(call), outside=frozenset(tape.slots.values()))


def _stage(block: Block, rows: Sequence[PlanRow], walks: Sequence[_Walk], number: int) -> Stage:
    """Bring all calls to a pause, and gather what is read there."""
    by_path = {row.module: row for row in rows}
    paths = [read.path for read in walks[0].tape.pauses[number].reads]
    statistics: dict[str, Inputs] = {}
    experts: dict[str, ExpertInputs] = {}
    for path in paths:
        if by_path[path].kind is WeightKind.EXPERTS:
            experts[path] = ExpertInputs(block.owner(by_path[path]))
    slabs = Slabs()
    for index, walk in enumerate(walks):
        pause = walk.tape.pauses[number]
        walk.go(pause.position)
        _gather(block, by_path, walk, pause, statistics, experts, slabs)
        walk.settle(slabs)
        _tidy(index)
    made = tuple(row for row in rows if row.module in paths)
    for inputs in {id(one): one for one in statistics.values()}.values():
        inputs.finish(", ".join(path for path in statistics if statistics[path] is inputs))
    return Stage(made, {row.name: statistics[row.module] for row in made if row.module in statistics}, experts)


def _gather(
    block: Block,
    by_path: dict[str, PlanRow],
    walk: _Walk,
    pause: Pause,
    statistics: dict[str, Inputs],
    experts: dict[str, ExpertInputs],
    slabs: Slabs,
) -> None:
    """Take in what modules read of one call at a pause."""
    for group in pause.shared:
        first = group[0].path
        source, *routing = group[0].values
        if first in experts:
            index = walk.values[routing[0]]
            held = walk.hold(source, slabs)
            experts[first].add(walk.call, held, index if isinstance(index, Tensor) else index.restore())
            continue
        row, value = by_path[first], walk.values[source]
        dense = value.restore() if isinstance(value, Held) else value
        if first not in statistics:
            shared = empty_for(block.owner(row), row)
            statistics.update({read.path: shared for read in group})
        statistics[first].add(tokens_of(block.owner(row), walk.call, dense))
    for group in pause.shared:
        walk.hold(group[0].values[0], slabs)
